"""Any value in any field of a recipe is a recipe that survives its own JSON, or one sentence that names the field."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
from tiny_run import TINY

from fastgan.training.recipes import Recipe

FIELDS = [field.name for field in dataclasses.fields(Recipe)]
TEXTS = (
    *("", " ", "none", "None", "true", "ada", "ada,cutout", "cutout,colour", "colour,,", "relativistic", "hinge", "-"),
    *("nan", "inf", "-inf", "1e999", "0", "-0.0", "0.5", "1", "1.5", "-3", "12345678901234567890", "(1, 2)", "[0.5]"),
    *("{'a': 1}", "0x10", "é", "a\0b", "'", "(" * 50, "1_000", "x" * 300, "0.1,0.2", "((0.5, 0.9), 0)"),
)
SPEAKERS = ("recipe: ", "models: ")
VALUES = (None, True, False, -1, 0, 1, 1 << 70, -0.5, 0.3, float("nan"), float("inf"), [], [1, 2], {}, {"a": 1}, b"x")


def survives(make, field):
    """Whether `make` gives a recipe; asserts what the docstring of this file says."""
    try:
        recipe = make()
    except (ValueError, TypeError) as error:
        text = str(error)
        assert text.startswith(SPEAKERS) and "\n" not in text and len(text) < 1000, text
        assert field in text or "classes" in text or "ema" in text or "conditional" in text, (field, text)
        return False
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    return True


@pytest.mark.parametrize("field", FIELDS)
def test_one_field(field):
    found = [survives(lambda text=text: TINY.with_settings([f"{field}={text}"]), field) for text in TEXTS]
    found += [survives(lambda value=value: TINY.replace(**{field: value}), field) for value in VALUES]
    assert not all(found) or field in ("name", "source")  # every field refuses something


def test_several_fields_at_once():
    rng, made = random.Random(0), 0
    for _ in range(2000):
        settings = [f"{rng.choice(FIELDS)}={rng.choice(TEXTS)}" for _ in range(rng.randint(1, 3))]
        try:
            recipe = TINY.with_settings(settings)
        except (ValueError, TypeError) as error:
            assert str(error).startswith(SPEAKERS) and "\n" not in str(error), (settings, error)
        else:
            made += 1
            assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert made > 100
