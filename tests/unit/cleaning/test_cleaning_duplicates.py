"""Near duplicates: what is matched has the similarity that is told, whatever the index takes for alike."""

from __future__ import annotations

import random

import pytest

from ultrafuser_mega.cleaning.duplicates import Match, NearDuplicates, digest_of
from ultrafuser_mega.cleaning.words import words
from ultrafuser_mega.errors import InputError

pytest.importorskip("rensa")

LAMPS = "Write a story about a lighthouse keeper who finds a map of an island that nobody has ever seen."


def jaccard(one: str, other: str) -> float:
    """Of the sets of three successive words, written down a second time."""
    sets = [{tuple(found[n : n + 3]) for n in range(len(found) - 2)} for found in (words(one), words(other))]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_a_text_matches_the_most_similar_one_so_far() -> None:
    near = NearDuplicates(0.5)
    near.add("lamps", LAMPS)
    near.add("closer", LAMPS.replace("nobody", "no sailor"))
    asked = LAMPS.replace("nobody", "no sailor").upper()
    assert near.match(asked) == Match("closer", 1.0)
    match = near.match(LAMPS.replace("island", "old island"))
    assert match is not None and match.key == "lamps"
    assert match.similarity == pytest.approx(jaccard(LAMPS, LAMPS.replace("island", "old island")))
    assert near.match("Explain why the sky is blue to a child of seven years.") is None


def test_only_similarities_from_the_threshold_on_match() -> None:
    other = LAMPS.replace("keeper", "guard").replace("island", "old island")
    similarity = jaccard(LAMPS, other)
    for threshold, matches in ((similarity - 0.01, True), (similarity + 0.01, False)):
        near = NearDuplicates(threshold)
        near.add("lamps", LAMPS)
        assert (near.match(other) is not None) is matches


def test_match_or_add_keeps_only_what_matches_nothing() -> None:
    near = NearDuplicates(0.7)
    assert near.match_or_add("first", LAMPS) is None
    assert near.match_or_add("second", f"{LAMPS} Now!") == Match("first", jaccard(LAMPS, f"{LAMPS} Now!"))
    assert len(near) == 1


def test_texts_of_fewer_than_three_words_match_as_a_whole() -> None:
    near = NearDuplicates(0.7)
    for text in ("Sing", "Sing loud", "+ - *"):
        assert near.match_or_add(text, text) is None
    assert near.match("sing!") == Match("Sing", 1.0)
    assert near.match("+ - /") is None


def test_a_match_is_found_among_very_many_that_are_somewhat_alike() -> None:
    near = NearDuplicates(0.7)
    exercises = [
        f"{LAMPS} Name {n} of its {n + 7} hills, {n + 13} lakes and {n + 29} bays, all in order." for n in range(1500)
    ]
    assert all(near.match_or_add(str(n), text) is None for n, text in enumerate(exercises))
    match = near.match(exercises[1234] + " Please!")
    assert match == Match("1234", jaccard(exercises[1234], exercises[1234] + " Please!"))


def test_nearly_all_similar_pairs_are_found() -> None:
    generator = random.Random(0)
    vocabulary = [f"word{number}" for number in range(2000)]
    similar = found = 0
    for _ in range(400):
        first = generator.choices(vocabulary, k=40)
        second = list(first)
        for place in generator.sample(range(40), generator.randint(1, 3)):
            second[place] = "other"
        near = NearDuplicates(0.7)
        near.add("first", " ".join(first))
        match, similarity = near.match(" ".join(second)), jaccard(" ".join(first), " ".join(second))
        similar += similarity >= 0.7
        if match is not None:
            assert match.similarity == pytest.approx(similarity) and similarity >= 0.7
            found += 1
    assert similar > 200 and found >= 0.95 * similar


@pytest.mark.parametrize("threshold", [0, -1, 1.1])
def test_a_threshold_that_means_nothing_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match="above 0, at most 1"):
        NearDuplicates(threshold)


def test_digests_tell_words_and_their_places_apart_and_nothing_else() -> None:
    assert digest_of(["What's up?"]) == digest_of(["what s UP"])
    assert digest_of(["a b", "c"]) != digest_of(["a", "b c"])
    assert digest_of(["+"]) != digest_of(["-"])
