from __future__ import annotations

import numpy as np
import pytest
import torch

from ml.config import read_recipe
from ml.embed import BatchSize, embed, embed_each, shared_volumes, standardise, statistics, to_input
from ml.encoders import build_encoder


def test_embeddings_do_not_depend_on_the_batch_they_were_made_in() -> None:
    recipe = read_recipe("tiny", {"shape_zyx": "16,16,16", "batch": "2"})
    volumes = np.random.default_rng(0).normal(-500, 200, (11, 16, 16, 16)).astype(np.int16)
    encoder = build_encoder("tiny").train()
    together = embed(encoder, recipe, lambda i, out=None: volumes[i], list(range(11)))
    alone = np.concatenate([embed(encoder, recipe, lambda i, out=None: volumes[i], [i]) for i in range(11)])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert encoder.training


def test_no_more_volumes_are_embedded_at_once_than_a_batch_of_the_recipe() -> None:
    recipe = read_recipe("tiny", {"shape_zyx": "16,16,16", "batch": "2"})
    encoder, seen = build_encoder("tiny"), list[int]()
    encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    embed(encoder, recipe, lambda i, out=None: np.full((16, 16, 16), i, np.int16), list(range(5)))
    assert seen == [2, 2, 1]


def test_the_encoder_sees_the_window_of_its_recipe() -> None:
    recipe = read_recipe("tiny")
    made = to_input(torch.tensor([[[[-2000, -500, 3000]]]], dtype=torch.int16), recipe)
    assert made.flatten().tolist() == [(-1000 + 500) / 400, 0, (200 + 500) / 400]


def test_standardised_embeddings_have_mean_zero_and_sd_one_at_train() -> None:
    raw = np.random.default_rng(0).normal(10, [1, 3, 0], (50, 3)).astype(np.float32)
    made = standardise(raw, *statistics(raw))
    np.testing.assert_allclose(made.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(made.std(0), [1, 1, 0], atol=1e-5)


def test_vectors_that_cannot_be_searched_for_are_refused() -> None:
    mean, sd = np.zeros(2), np.ones(2)
    for vector, words in (([0, 0], "are zero"), ([np.nan, 1], "are not finite"), ([1e6, 1], "beyond the range")):
        with pytest.raises(ValueError, match=words):
            standardise(np.array([[1, 1], vector], np.float32), mean, sd)
    with pytest.raises(ValueError, match="the same vector"):
        statistics(np.ones((5, 3), np.float32))


def test_shared_volumes_are_those_of_different_persons() -> None:
    content = ["a", "a", "b", "c", "c", "c"]
    assert shared_volumes(content, np.array([1, 1, 2, 3, 3, 4])) == 3


def test_a_batch_doubles_while_that_is_faster_and_halves_where_it_does_not_fit() -> None:
    batch = BatchSize(2, grows=True)
    sizes = []
    for seconds in (1.0, 1.0, 2.0):  # 2 then 4 then 8 volumes: twice as fast, then no faster
        sizes.append(batch.size)
        batch.took(batch.size, seconds)
    assert sizes == [2, 4, 8] and batch.size == 4
    batch.took(4, 0.1)
    assert batch.size == 4, "it has settled"
    batch.does_not_fit()
    batch.does_not_fit()
    assert batch.size == 1
    with pytest.raises(torch.OutOfMemoryError):
        batch.does_not_fit()


def test_embedding_goes_on_with_half_the_batch_where_memory_does_not_suffice() -> None:
    encoder, recipe = build_encoder("tiny"), read_recipe("tiny", {"batch": "4", "shape_zyx": "16,16,16"})
    volumes = np.random.default_rng(0).integers(-1000, 400, (7, 16, 16, 16)).astype(np.int16)
    wanted = embed(encoder, recipe, lambda i, out=None: volumes[i], range(7))
    fits = encoder.body.forward

    def narrow(volume: torch.Tensor) -> torch.Tensor:
        if len(volume) > 2:
            raise torch.OutOfMemoryError("too much")
        return fits(volume)

    encoder.body.forward = narrow  # type: ignore[method-assign]
    np.testing.assert_allclose(
        embed(encoder, recipe, lambda i, out=None: volumes[i], range(7)), wanted, rtol=1e-4, atol=1e-5
    )


def test_an_embedding_that_goes_on_gives_the_bits_of_one_without_a_break() -> None:
    recipe = read_recipe("tiny", {"shape_zyx": "16,16,16", "batch": "4"})
    volumes = np.random.default_rng(0).normal(-500, 200, (11, 16, 16, 16)).astype(np.int16)
    encoder, read = build_encoder("tiny"), list[int]()

    def made(known: range) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        embed_each(
            encoder,
            recipe,
            lambda i, out=None: read.append(i) or volumes[i],
            range(11),
            lambda items, raw: found.update(zip(items, raw, strict=True)),
            known=known,
        )
        return found

    whole = made(range(0))
    read.clear()
    again = made(range(6))
    assert sorted(read) == list(range(4, 11)), "the first batch is known as a whole, the second is not"
    for item, vector in again.items():
        np.testing.assert_array_equal(vector, whole[item])
