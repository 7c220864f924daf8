"""The real data set that trainers and benchmarks use."""

from __future__ import annotations

from bench.movie_reviews import Review


def test_there_are_as_many_as_the_release_says_rated_within_its_scale(reviews: list[Review]) -> None:
    assert len(reviews) == 10_605
    assert all(-4 <= review.rating <= 4 for review in reviews)
    assert reviews[2] == Review("Effective but too tepid biopic", -0.6)
    positive = sum(review.rating > 0 for review in reviews)
    assert 0.49 < positive / len(reviews) < 0.51
