import pytest
import torch

from synthrepro.errors import UserError
from synthrepro.synthesis import Draw
from synthrepro.synthesis.draws import normal, pixel_generators, seeds, spawn, uniform


def numbers(count: int) -> torch.Tensor:
    samples = spawn(count, torch.Generator().manual_seed(7))
    parts = [uniform(samples, (3,), (-2, 5)), normal(samples, (40,)), seeds(samples)[:, None].double()]
    return torch.cat(parts, 1)


def test_a_sample_draws_the_same_numbers_in_any_batch():
    assert torch.equal(numbers(2), numbers(6)[:2])


def test_samples_of_a_batch_draw_different_numbers():
    drawn = numbers(6)
    assert all(len(column.unique()) == 6 for column in drawn.T)


def test_spawn_takes_one_number_a_sample():
    one, other = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    spawn(5, one)
    torch.randint(2**62, (5,), generator=other)
    assert torch.equal(one.get_state(), other.get_state())


def test_uniform_numbers_fill_their_bounds():
    drawn = uniform(spawn(50, torch.Generator().manual_seed(0)), (200,), (-2.0, 5.0))
    assert drawn.min() >= -2
    assert drawn.max() <= 5
    assert drawn.mean() == pytest.approx(1.5, abs=0.1)
    assert drawn.std() == pytest.approx(7 / 12**0.5, abs=0.05)


def test_pixel_noise_is_not_the_stream_the_parameters_came_from():
    samples = spawn(1, torch.Generator().manual_seed(0))
    parameters = normal(spawn(1, torch.Generator().manual_seed(0)), (1000,))
    pixels = normal(pixel_generators(seeds(samples), torch.device("cpu")), (1000,))
    assert abs(torch.corrcoef(torch.cat([parameters, pixels]))[0, 1]) < 0.1


def test_nothing_touches_the_global_random_state():
    before = torch.get_rng_state()
    numbers(3)
    assert torch.equal(before, torch.get_rng_state())


def test_a_draw_is_indexed_and_moved_with_the_draws_it_holds():
    draw = Draw(field=Draw(log=torch.arange(6.0).reshape(3, 2)), eps=torch.arange(3.0))
    assert len(draw) == 3
    for index, expected in [(1, [1.0]), (-1, [2.0]), (slice(1, 3), [1.0, 2.0])]:
        assert draw[index].eps.tolist() == expected
        assert len(draw[index].field) == len(expected)
    assert draw.to(torch.float64).field.log.dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_generator_on_a_gpu_is_refused():
    with pytest.raises(UserError, match="CPU"):
        spawn(1, torch.Generator("cuda"))
