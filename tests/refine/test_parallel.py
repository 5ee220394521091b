"""Several processes: shares, sums and poses through gloo in main memory; retries when memory runs out."""
from __future__ import annotations

import os
import socket
from dataclasses import fields, replace

import pytest
import torch
import torch.multiprocessing as mp

from frazil.data import Optics
from frazil.refine.model import Model, Poses, Statistics
from frazil.refine.parallel import SMALLEST_SHARE, World, join, leave, local_device, with_less_memory, world_of_environment
from frazil.refine.windows import Engine
from frazil.simulate.averages import particles_of, pictures
from frazil.simulate.classes import simulate_classes
from frazil.simulate.particles import Settings
from frazil.steps import class2d
from frazil.steps.class3d import FORM, Class3dParams
from frazil.steps.classify import ClassifyJob, initial_state, iterate, make_engine

N = 7


def statistics(seed: int) -> Statistics:
    """Random sums."""
    g = torch.Generator().manual_seed(seed)
    f = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return Statistics(
        torch.complex(f(2, 5, 5, 3), f(2, 5, 5, 3)), f(2, 5, 5, 3), (f(4), f(6)), f(2), f(2, 3), float(f(1)), f(2, 2), f(3), f(3),
        float(f(1)), float(f(1)), float(f(1)), 10 + seed,
    )  # fmt: skip


def poses(index: torch.Tensor) -> Poses:
    """Poses that tell whose they are."""
    made = Poses.empty(len(index))
    made.shift[:, 0] = index.double()
    made.klass[:] = index % 3
    return made


def model(rank: int) -> Model:
    """A model that differs between the processes."""
    x = torch.full((2, 3), float(rank), dtype=torch.float64)
    maps = x[:, None, None, :].repeat(1, 3, 3, 1)
    return Model(maps, 1.0, (x[0],), x[0], float(rank), 1.0, x[:, 0], x, x, x, x[0], x, x, log_likelihood=rank)


def classified(world: World) -> dict[str, torch.Tensor]:
    """Three classes of few particles after three iterations: cross-correlation, seeds, likelihood."""
    made = simulate_classes(48, Optics(6.0, 24), 3, Settings(snr=1.0, shift_sd=3.0, seed=2))
    eye = torch.eye(3, dtype=torch.float64).repeat(48, 1, 1)
    particles = replace(made.particles, rotation=eye, shift=torch.zeros(48, 2, dtype=torch.float64), klass=torch.zeros(48).long())
    params = Class3dParams(classes=3, initial_lowpass=30, diameter=110, offset_range=2, offset_step=1, healpix_order=1, iterations=3)
    job = ClassifyJob(made.images, params, make_engine(params, seed=1, dtype=torch.float64), FORM, world=world)
    state = initial_state(job, particles, made.maps[0].data[None], 6.0)
    for _ in range(3):
        state = iterate(job, state)
    return {
        "maps": state.model.maps, "share": state.model.pdf_class, "klass": state.poses.klass, "accuracy": state.accuracy,
        "ssnr": state.model.data_vs_prior, "rotation": state.poses.rotation, "sigma2": state.model.sigma2[0],
    }  # fmt: skip


def averaged(world: World, method: str) -> dict[str, torch.Tensor]:
    """Three 2D classes after two steps of which the first takes a part of the particles; of others' particles no image is at hand."""
    generator = torch.Generator().manual_seed(4)
    images, particles, _ = particles_of(pictures(3, 24, generator), 60, 5.0, 2.0, 1.0, generator)
    small = {"classes": 3, "diameter": 90, "offset_range": 2, "psi_step": 30, "iterations": 2, "explore": 0.5, "scale": False}
    params = class2d.resolved(class2d.Class2dParams(method=method, **small), 5.0)
    job = ClassifyJob(images, params, make_engine(params, seed=1, dtype=torch.float64), class2d.FORM, world=world)
    state, others = class2d.initial_state(job, particles, 5.0), torch.ones(60, dtype=torch.bool)
    others[world.share(60)] = False
    images = images.clone()
    images[others] = torch.nan
    *_, state = class2d.class2d(replace(job, images=images), state)
    return {"maps": state.model.maps, "share": state.model.pdf_class, "klass": state.poses.klass, "rotation": state.poses.rotation}


def work(rank: int, port: int, folder: str) -> None:
    """What one of two processes does."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = join("cpu")
    total = world.total(statistics(rank))
    everyone = world.gather(poses(world.share(N)), N)
    same = world.agree(model(rank + 3))
    but = world.agree(model(rank + 3), but=("maps",))
    own, added = list(world.own(5)), world.add_up_(torch.tensor([1.0, 10.0 * rank]))
    told = world.tell({"a": 10 * (rank + 1), "b": torch.tensor([rank])})
    found = {
        "total": vars(total), "poses": vars(everyone), "model": vars(same), "told": told, "but": but.maps, "own": own, "added": added,
        "classes": classified(world), "world": (world.rank, world.size),
        "averages": {method: averaged(world, method) for method in ("em", "vdam")},
    }  # fmt: skip
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("parallel")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_each_has_its_own_classes_and_maps(results):
    assert [found["own"] for found in results] == [[0, 2, 4], [1, 3]]
    assert [float(found["but"].max()) for found in results] == [3.0, 4.0]  # maps are left as they are
    assert all(found["added"].tolist() == [2.0, 10.0] for found in results)


def test_a_classification_by_two_is_that_of_one(results):
    """Each makes the maps of its own classes and the accuracies; all end with the same bits, and with what one process finds."""
    alone = classified(World())
    for name, wanted in alone.items():
        assert torch.equal(results[0]["classes"][name], results[1]["classes"][name]), name
        torch.testing.assert_close(results[0]["classes"][name], wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
    assert len(alone["klass"].unique()) == 3 and float(alone["accuracy"].max()) < 900


@pytest.mark.parametrize("method", ["em", "vdam"])
def test_a_part_of_the_particles_by_two_is_that_of_one(results, method):
    """Halves of an exploring run, mini-batches of gradients: each process reads its own of them."""
    for name, wanted in averaged(World(), method).items():
        one, two = (found["averages"][method][name] for found in results)
        assert torch.equal(one, two), name
        torch.testing.assert_close(one, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


def test_sums_of_all_processes_are_on_each(results):
    wanted = statistics(0) + statistics(1)
    for found in results:
        for f in fields(Statistics):
            a, b = found["total"][f.name], getattr(wanted, f.name)
            pairs = zip(a, b, strict=True) if isinstance(b, tuple) else [(a, b)]
            for x, y in pairs:
                assert torch.allclose(torch.as_tensor(x), torch.as_tensor(y), rtol=1e-14), f.name
    assert isinstance(results[0]["total"]["particles"], int)


def test_poses_come_back_in_order(results):
    for found in results:
        assert found["poses"]["shift"][:, 0].tolist() == list(range(N))
        assert found["poses"]["klass"].tolist() == [i % 3 for i in range(N)]


def test_all_go_on_with_the_first_ones_model(results):
    for found in results:
        assert float(found["model"]["maps"].min()) == float(found["model"]["maps"].max()) == 3.0
        assert found["model"]["norm_average"] == 3.0 and float(found["model"]["sigma2"][0][0]) == 3.0
        assert found["told"] == {"a": 10, "b": torch.tensor([0])}
    assert [found["world"] for found in results] == [(0, 2), (1, 2)]


def test_shares_are_disjoint_and_complete():
    for size in (1, 2, 3, 5):
        parts = [World(rank, size).share(N) for rank in range(size)]
        assert sorted(torch.cat(parts).tolist()) == list(range(N))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_some_particles_are_shared_out_as_all_are():
    """Each process has the images of its share of all: of any others it finds those, and none else."""
    members = torch.tensor([0, 1, 4, 5, 6])
    for size in (1, 2, 3):
        for rank in range(size):
            mine = members[World(rank, size).share(len(members), members)]
            assert mine.tolist() == [i for i in members.tolist() if i in World(rank, size).share(N)]


def test_alone_nothing_is_copied():
    world, sums = World(), statistics(1)
    assert world.total(sums) is sums and world.tell(sums) is sums and world_of_environment() == world


def test_torchrun_gives_each_process_its_gpu(monkeypatch):
    assert local_device("cuda:0") == "cuda:0" and local_device("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device("cuda") == "cuda:3" and local_device("cpu") == "cpu"


def test_smaller_batches_when_memory_runs_out():
    tried = []

    def needs_a_quarter(engine: Engine) -> str:
        tried.append(engine.shrink)
        if engine.shrink < 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert with_less_memory(Engine(diameter=1), needs_a_quarter) == ("done", 4) and tried == [1, 2, 4]

    def never(engine: Engine) -> str:
        tried.append(engine.shrink)
        raise torch.OutOfMemoryError("CUDA out of memory")

    tried.clear()
    with pytest.raises(torch.OutOfMemoryError):
        with_less_memory(replace(Engine(diameter=1), shrink=2), never)
    assert tried == [2, 4, 8, SMALLEST_SHARE]
