"""The training engine: step, losses, penalties, EMA, recipes, trainer. Import from the modules themselves."""
