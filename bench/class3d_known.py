"""How many particles of known classes 3D classification puts right: python bench/class3d_known.py [--device cuda] [--seeds 1 2] [--write]

8,000 simulated particles of four structures in equal parts (the whole phantom, and without one of its domains each: 8 to 20 % of its
mass), signal to noise 0.05, C1; from the whole one low-passed to 60 Å, classes drawn at random. Prints the share in the right class after
every iteration. --truth begins with the four maps instead, --true-poses keeps the true orientations and shifts: what is lost then is lost
by the search, or by the classes. Other options are those of `frazil class3d`.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from frazil.data import Optics  # noqa: E402
from frazil.jobs.bench import agreement  # noqa: E402
from frazil.jobs.record import source_commit  # noqa: E402
from frazil.refine.residence import Resident  # noqa: E402
from frazil.simulate.classes import ClassSet, simulate_classes  # noqa: E402
from frazil.simulate.particles import Settings  # noqa: E402
from frazil.steps.class3d import FORM, Class3dParams  # noqa: E402
from frazil.steps.classify import ClassifyJob, classify, initial_state, make_engine  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "class3d_known.jsonl"
SIDE = 482.4  # Å, of the field of view whatever the box


def course(made: ClassSet, args: argparse.Namespace, seed: int) -> dict[str, object]:
    """One classification."""
    n, device, pixel_size = args.particles, args.device, SIDE / args.box
    particles = replace(made.particles, klass=torch.zeros(n, dtype=torch.int64))
    if not args.true_poses:
        eye = torch.eye(3, dtype=torch.float64).repeat(n, 1, 1)
        particles = replace(particles, rotation=eye, shift=torch.zeros(n, 2, dtype=torch.float64))
    params = Class3dParams(
        classes=args.classes, iterations=args.iterations, diameter=320, initial_lowpass=20 if args.truth else 60, tau_fudge=args.tau_fudge,
        equal_filter=args.equal_filter, auto_sampling=not args.no_auto_sampling, skip_align=args.true_poses,
        strict_highres=args.strict_highres, firstiter_cc=not args.truth,
    )  # fmt: skip
    budget = int(0.5 * torch.cuda.mem_get_info(device)[0]) if device != "cpu" else 4 << 30
    job = ClassifyJob(
        Resident((made.images,), particles.group, torch.arange(n, device=device)), params,
        make_engine(params, device=device, budget=budget, seed=seed), FORM,
    )  # fmt: skip
    maps = torch.stack([volume.data for volume in made.maps[: args.classes if args.truth else 1]])
    right, off, start = [], 1.0, time.perf_counter()
    for state in classify(job, initial_state(job, particles, maps, pixel_size)):
        share, off = agreement(made.particles.klass - 1, state.poses.klass, state.model.pdf_class)
        right.append(round(share, 4))
    return {
        "bench": "class3d_known", "commit": source_commit(), "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "seed": seed, **{k: v for k, v in vars(args).items() if k not in ("write", "seeds", "device")}, "right": right,
        "occupancy_error": round(off, 4), "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Class3dParams()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--particles", type=int, default=8000)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--snr", type=float, default=0.05)
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--equal-filter", type=float, default=defaults.equal_filter)
    parser.add_argument("--no-auto-sampling", action="store_true")
    parser.add_argument("--tau-fudge", type=float, default=defaults.tau_fudge)
    parser.add_argument("--strict-highres", type=float)
    parser.add_argument("--truth", action="store_true", help="begin with the true maps, low-passed to 20 Å")
    parser.add_argument("--true-poses", action="store_true", help="keep the true poses")
    parser.add_argument("--write", action="store_true", help=f"append to {RESULTS}")
    args = parser.parse_args()
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    made = simulate_classes(
        args.particles, Optics(SIDE / args.box, args.box), args.classes, Settings(snr=args.snr, seed=1), device=args.device, dtype=dtype
    )
    for seed in args.seeds:
        row = course(made, args, seed)
        print(row, flush=True)
        if args.write:
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
