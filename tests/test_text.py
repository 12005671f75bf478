"""Lines of text: files and what is wrong with them, n-grams, and the recipe `chargan` through trainer and command."""

import math
import random

import pytest
import torch
from tiny_run import assert_same_state

import fastgan
from fastgan.cli import main
from fastgan.data.lines import END, LineSet, load_lines, texts
from fastgan.domains import domain_of
from fastgan.metrics import ngram_divergence

SMALL = fastgan.recipes()["chargan"].replace(
    model_options={"width": 8, "blocks": 1}, batch_size=8, steps=4, eval_every=2, log_every=1, sample_count=6
)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_lines_of_files_are_read_and_what_is_wrong_is_counted_and_named(tmp_path, caplog):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.txt").write_text("one cat\n\n  two   cats \n\n\nthree cats in a row\n")
    (tmp_path / "bom.txt").write_bytes("\ufeffcafé\n".encode())
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "inner" / "latin.txt").write_bytes("café au lait".encode("latin-1"))
    (tmp_path / "nul.txt").write_bytes(b"\0\1\2\0")
    (tmp_path / "wide.txt").write_text("a dog\n", encoding="utf-16")
    (tmp_path / "other.md").write_text("no line of the set")
    (tmp_path / ".hidden.txt").write_text("nor this")
    lines = load_lines(str(tmp_path), length=10)
    assert lines.lines() == ["one cat", "two cats", "three cats", "café", "café au la", "a dog"]
    assert lines.alphabet[0] == END and lines.alphabet == END + "".join(sorted(set(lines.alphabet[1:])))
    said = dict.fromkeys(name for name, _ in lines.skipped)
    assert said.keys() == {"a.txt", "empty.txt", "inner/latin.txt", "nul.txt"}
    assert ("a.txt", "3 empty lines") in lines.skipped
    assert ("a.txt", "1 line cut at 10 characters") in lines.skipped
    assert ("inner/latin.txt", "byte 3 is not UTF-8, read as Latin-1") in lines.skipped
    assert ("nul.txt", "it has NUL characters and is no text, or UTF-16 without its mark") in lines.skipped
    assert len(caplog.records) == 1 and f"4 files of {tmp_path} are not as they should be: " in caplog.text
    assert (
        "a.txt: 1 line cut at 10 characters (2 such); a.txt: 3 empty lines; empty.txt: the file is empty;"
        in caplog.text
    )


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_mark_says_the_encoding(tmp_path, encoding):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffun café\nune été".encode(encoding))
    lines = load_lines(str(file), length=10)
    assert lines.lines() == ["un café", "une été"] and lines.skipped == []
    file.write_bytes(file.read_bytes()[:-1])
    lines = load_lines(str(file), length=10)
    assert lines.lines() == ["un café", "une ét\ufffd"]
    ((_, said),) = lines.skipped
    assert f"is not {encoding[:6].upper()}, damaged characters are replaced" in said


def test_one_file_and_a_given_alphabet(tmp_path):
    file = tmp_path / "words"
    file.write_text("abba\nabc\nb")
    lines = load_lines(str(file), length=5, alphabet="\nab")
    assert lines.lines() == ["abba", "b"] and lines.values.tolist() == [[1, 2, 2, 1, 0], [2, 0, 0, 0, 0]]
    assert lines.skipped == [("words", "1 line with rare characters left out")]


def test_rare_characters_leave_an_alphabet_of_96(tmp_path):
    file = tmp_path / "many.txt"
    file.write_text("\n".join(chr(0x4E00 + i) * (200 - i) for i in range(150)))
    lines = load_lines(str(file), length=200)
    assert len(lines) == 95 == len(lines.alphabet) - 1
    assert lines.skipped == [("many.txt", "55 lines with rare characters left out")]


@pytest.mark.parametrize(
    "content, alphabet, message",
    [
        (b"", "", r"must hold a line of text, it holds none; a.txt: the file is empty"),
        (b"\n \n", "", r"it holds none; a.txt: 2 empty lines"),
        (b"abc", "abc", "different characters from .*, got 'abc'"),
        (b"abc", "\naa", r"different characters"),
    ],
)
def test_text_that_is_none(tmp_path, content, alphabet, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_lines(str(tmp_path), length=4, alphabet=alphabet)


def test_no_files(tmp_path):
    with pytest.raises(ValueError, match=r"must hold text files \(.txt\), it holds none"):
        load_lines(str(tmp_path), length=4)
    with pytest.raises(ValueError, match="does not exist"):
        load_lines(str(tmp_path / "nowhere"), length=4)


def test_the_demonstration_is_every_sentence_once():
    lines = load_lines("sentences", length=24)
    assert len(set(lines.lines())) == len(lines) == 4608 and "the red fox eats" in lines.lines()
    hot = lines.pick(torch.tensor([7, 4607]))
    assert hot.shape == (2, len(lines.alphabet), 24) and torch.equal(hot.sum(1), torch.ones(2, 24))
    assert texts(hot.argmax(1), lines.alphabet) == lines.lines(torch.tensor([7, 4607]))


# ---- n-grams --------------------------------------------------------------------------------------------------------


def test_ngram_divergence_by_hand():
    assert ngram_divergence(["abc", "b"], ["b", "abc"], 2) == 0.0
    assert ngram_divergence(["aa"], ["bb"], 2) == 1.0 and ngram_divergence(["aa"], ["bb"], 1) < 1.0  # both end
    # "a\n" has a, end: 1/2 each; "\n" has the end alone; their mean 1/4, 3/4
    left = 0.5 * math.log2(0.5 / 0.25) + 0.5 * math.log2(0.5 / 0.75)
    assert ngram_divergence(["a"], [""], 1) == pytest.approx((left + math.log2(1 / 0.75)) / 2, rel=1e-15)
    with pytest.raises(ValueError, match="a line of 3 characters, its end included, got none"):
        ngram_divergence(["ab"], ["a"], 3)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        ngram_divergence(["ab"], ["a"], 0)


def test_ngram_divergence_orders_what_is_better_and_worse():
    lines = load_lines("sentences", length=24).lines()
    rng = random.Random(0)
    rng.shuffle(lines)
    half, other = lines[:1000], lines[1000:2000]
    mixed = ["".join(rng.sample(line, len(line))) for line in other]  # the same letters
    noise = ["".join(rng.choices("abcdefghijklmnop", k=20)) for _ in other]
    for n in (2, 3, 4):
        real, letters, none = (ngram_divergence(half, some, n) for some in (other, mixed, noise))
        assert real < 0.03 and 5 * real < letters < none
    assert ngram_divergence(half, mixed, 1) == pytest.approx(ngram_divergence(half, other, 1))


# ---- the recipe -----------------------------------------------------------------------------------------------------


def test_chargan_trains_reports_and_prints_lines(tmp_path, capsys):
    run = tmp_path / "run"
    trainer = fastgan.Trainer(SMALL, out=run, device="cpu", quiet=True)
    result = trainer.fit()
    assert result.step == 4 and {"jsd4", "jsd1"} <= result.metrics.keys() and "penalty" in result.metrics
    assert trainer.recipe.domain_options["alphabet"] == trainer.images.alphabet
    assert len((run / "samples" / "step-0000004.txt").read_text().splitlines()) == 6
    page = (run / "report.html").read_text()
    assert "<pre>" in page and "<h2>N-grams</h2>" in page and "generated lines are training lines" in page
    capsys.readouterr()
    assert main(["sample", "--run", str(run), "--n", "5"]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 5
    assert main(["sample", "--run", str(run), "--n", "5", "--out", str(tmp_path / "five.txt")]) == 0
    assert (tmp_path / "five.txt").read_text() == printed
    assert main(["sample", "--run", str(run), "--out", str(tmp_path / "a.wav")]) == 2
    assert "must end in .txt or .png" in capsys.readouterr().err


def test_branches_of_chargan_weigh_what_its_source_gives_them():
    """By torch's own initialisation they are 0.04 to 0.05 of their input: such a critic counts letters, no words."""
    torch.manual_seed(0)
    generator, critic = fastgan.models.build("chargan")
    lines = torch.eye(28)[torch.randint(28, (64, 24))].mT
    with torch.no_grad():
        z = generator.dense(torch.randn(64, 128)).view(64, 64, 24)
        for network, x in ((generator, z), (critic, critic.first(lines))):
            for block in network.blocks:
                after = block(x)
                assert (after - x).std(0).mean() > 0.15 * x.std(0).mean()
                x = after


@pytest.mark.usefixtures("unraced")
def test_chargan_resumes_bit_for_bit(tmp_path):
    # how many lines are evaluated depends on how long they take, and a rate that falls on how many steps a run has
    recipe = SMALL.replace(eval_every=0, schedule="constant")
    whole = fastgan.Trainer(recipe, out=tmp_path / "whole", device="cpu", quiet=True)
    whole.fit()
    fastgan.Trainer(recipe.replace(steps=2), out=tmp_path / "parts", device="cpu", quiet=True).fit()
    parts = fastgan.Trainer(recipe, resume=tmp_path / "parts", quiet=True)
    parts.fit()
    assert_same_state(whole, parts)


def test_pictures_show_the_lines():
    domain = domain_of(SMALL)
    made = torch.zeros(2, *domain.shape)
    for at, character in enumerate("hello"):
        made[0, domain.alphabet.index(character), at] = 1
    made[:, 0, 5:] = made[1, 0, :5] = 1
    assert domain.lines(made) == ["hello", ""]
    pictures = domain.pictures(made)
    assert pictures.shape == (2, 1, 12, 24 * 7)
    assert pictures[0].max() > 0.5 and pictures[0, 0, :, 5 * 7 :].max() == -1 and pictures[1].max() == -1


def test_settings_that_cannot_be_meant_of_text():
    for setting in ("flip=true", "augment=colour"):
        with pytest.raises(ValueError, match="must be off for text"):
            domain_of(SMALL.with_settings([setting]))
    with pytest.raises(ValueError, match="length must be a whole number of at least 1, got 0"):
        fastgan.models.build("chargan", length=0)
    short = LineSet(torch.zeros(3, 5, dtype=torch.uint8), END + "a")
    with pytest.raises(ValueError, match="lines must be of 24 characters"):
        domain_of(SMALL).fit(short)
