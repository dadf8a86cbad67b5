"""Which edit types are offered: the documented weights and the balancing formula, by statistical tests.

Each test of frequencies is passed by a right program with probability 1 - 1e-6 whatever the seed (seeds are fixed: it passes
always), and its last assertion shows that it would notice another law.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
from PIL import Image
from scipy.stats import binomtest, chisquare

from byg_plugin.data.rules import EDIT_TYPES
from dataset_tools import backend_rules, prompts
from dataset_tools.balance import PRIORITY, Balance
from dataset_tools.generate_edits import Editor, _Attempt
from dataset_tools.inputs import ImageInput
from dataset_tools.settings import GenerateSettings

DRAWS = 10_000
CHANCE = 1e-6  # of a false alarm


def expected_weights(use: dict[str, float]) -> dict[str, float]:
    """The formula of the documentation, written once more."""
    mean = sum(PRIORITY.values()) / 10
    return {name: p / (1 + use.get(name, 0.0) / (p / mean)) for name, p in PRIORITY.items()}


def inclusion(weights: dict[str, float], k: int = 3) -> dict[str, float]:
    """Exact chance of each name to be among k drawn one after another without replacement."""
    chances = dict.fromkeys(weights, 0.0)
    for order in permutations(weights, k):
        chance, left = 1.0, sum(weights.values())
        for name in order:
            chance *= weights[name] / left
            left -= weights[name]
        for name in order:
            chances[name] += chance
    return chances


def p_value(counts: Counter[str], weights: dict[str, float]) -> float:
    total = sum(weights.values())
    return chisquare([counts[n] for n in EDIT_TYPES], [DRAWS * weights[n] / total for n in EDIT_TYPES]).pvalue


def test_documented_weights() -> None:
    assert set(PRIORITY) == set(EDIT_TYPES) == set(prompts.TAXONOMY) and len(EDIT_TYPES) == 10
    assert {name for name, p in PRIORITY.items() if p > 1} == {"remove", "replace"} and set(PRIORITY.values()) == {1.0, 1.5}


@pytest.mark.parametrize("use", [{}, {"remove": 40, "add": 7, "style_change": 90, "replace": 20, "background_change": 1}])
def test_frequencies_of_ten_thousand_draws(use: dict[str, int]) -> None:
    balance, rng = Balance(accepted=use), random.Random(3)
    drawn = [balance.draw(rng, 3) for _ in range(DRAWS)]
    assert all(len(set(names)) == 3 for names in drawn)
    weights = expected_weights(use)
    assert balance.weights() == pytest.approx(weights)
    first = Counter(names[0] for names in drawn)
    assert p_value(first, weights) > CHANCE
    offered = Counter(name for names in drawn for name in names)
    for name, chance in inclusion(weights).items():
        assert binomtest(offered[name], DRAWS, chance).pvalue > CHANCE / 10, name
    other = dict.fromkeys(EDIT_TYPES, 1.0)
    assert p_value(first, other) < CHANCE  # it would have noticed


def shares(liked: dict[str, float], balanced: bool) -> dict[str, float]:
    """Use of each type over what its priority asks for, after 10,000 images of a model with these likings."""
    balance, rng = Balance(), random.Random(5)
    for _ in range(DRAWS):
        offered = (balance if balanced else Balance()).draw(rng, 3)
        chosen = rng.choices(offered, [liked[name] for name in offered])[0]
        balance.reserve(offered)
        balance.release(offered, chosen)
    return {name: balance.accepted[name] / DRAWS / (PRIORITY[name] / sum(PRIORITY.values())) for name in EDIT_TYPES}


def test_use_follows_priority_where_the_model_has_no_preference() -> None:
    # Noise of 10,000 draws is 3 to 4 % of a share.
    liking = dict.fromkeys(EDIT_TYPES, 1.0)
    assert max(abs(share - 1) for share in shares(liking, True).values()) < 0.06


def test_balancing_damps_a_models_preferences() -> None:
    liked = {name: 1.0 + index / 3 for index, name in enumerate(EDIT_TYPES)}  # up to 4 : 1
    without, balanced = shares(liked, False), shares(liked, True)
    assert max(without.values()) / min(without.values()) > 2.5
    assert max(balanced.values()) / min(balanced.values()) < 2


def test_what_is_in_flight_counts_and_is_given_back_whole() -> None:
    balance, rng = Balance(), random.Random(0)
    flying = []
    for _ in range(300):
        flying.append(balance.draw(rng, 3))
        balance.reserve(flying[-1])
    assert sum(balance.use(name) for name in EDIT_TYPES) == pytest.approx(300)
    assert min(balance.use(name) for name in EDIT_TYPES) > 10
    assert balance.weights() == pytest.approx(expected_weights({name: balance.use(name) for name in EDIT_TYPES}))
    for index, offered in enumerate(flying):
        balance.release(offered, offered[0] if index % 2 else None)
    assert sum(balance.use(name) for name in EDIT_TYPES) == 150 == sum(balance.accepted.values())
    with pytest.raises(AssertionError):
        balance.release(("add",), None)


def test_more_types_than_there_are() -> None:
    assert sorted(Balance().draw(random.Random(0), 10)) == sorted(EDIT_TYPES)


def attempt(number: int, style: str | None, chance: float = 0.15) -> _Attempt:
    settings = GenerateSettings(images="x", out="y", style_conversion=chance)
    editor = Editor(settings=settings, balance=Balance(), backend=object())  # type: ignore[arg-type]
    return _Attempt(editor, ImageInput(source=f"{number}.png", path=Path("x"), style=style))


def test_style_conversion_comes_with_its_chance_and_only_for_what_is_no_photograph() -> None:
    tries = [attempt(number, "anime") for number in range(4000)]
    forced = [one for one in tries if one.to_photo]
    assert binomtest(len(forced), 4000, 0.15).pvalue > CHANCE
    assert binomtest(len(forced), 4000, 0.25).pvalue < CHANCE
    assert all(one.offered == ("style_change",) for one in forced)
    assert all(len(one.offered) == 3 for one in tries if not one.to_photo)
    for style in (None, "photo", "photorealistic"):
        assert not any(attempt(number, style, 1.0).to_photo for number in range(50))


def test_a_conversion_that_leads_to_no_photograph_is_refused() -> None:
    texts = {
        "edit_type": "style_change",
        "src_caption": "an anime drawing of a car",
        "instruction": "turn the image into a photograph",
        "tgt_caption": "a watercolor of a car",
        "reverse_instruction": "turn the image into an anime drawing",
    }
    reasons = {chance: [f.reason for f in attempt(1, "anime", chance)._check(texts) if f.hard] for chance in (0.0, 1.0)}
    assert "target_style" in reasons[1.0] and "target_style" not in reasons[0.0]


def test_what_is_accepted_counts_at_once_and_what_is_rejected_does_not(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    balance = Balance(dict.fromkeys(backend_rules.TYPES, 1.0))
    editor = Editor(settings=GenerateSettings(images="x", out="y", backend="rules"), balance=balance, backend=None)
    for number, caption in enumerate(("a red car", "a thing")):
        asyncio.run(editor.make(ImageInput(source=str(number), path=tmp_path / "a.png", caption=caption)))
    assert balance.accepted == {"color_change": 1} and sum(map(balance.use, backend_rules.TYPES)) == 1


def test_the_same_input_draws_the_same_whatever_came_before() -> None:
    assert attempt(1, "anime").seed == attempt(1, None).seed != attempt(2, None).seed
