"""The same auto-refinement with RELION and with frazil, on the same cores, one after the other: `python bench/against_relion.py`.

Needs relion_refine_mpi and mpirun on the PATH (Debian's package `relion`, 3.1.3, which cannot read float16 stacks: the particles are
first copied as float32, and both programs read the copies). RELION gets three processes, a leader and one a half set, as it must,
and is stopped after --limit seconds; the ratio of times is then a lower bound. Prints the ratio of wall times and how far the two
agree: FSC between the final maps in a soft sphere, angles between the poses modulo symmetry. A line is appended to
results/against_relion.jsonl. `--subset 400` gives a RELION run that ends in minutes on two cores.
"""
from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

import refine3d as job  # bench/refine3d.py: the timed run and the quality of its maps
from frazil.io.mrc import read_map, read_stack, write_mrc
from frazil.io.star import read_star, write_star
from frazil.maths.fsc import fsc
from frazil.maths.masks import soft_sphere
from frazil.maths.rotation import rotation_angle
from frazil.maths.symmetry import operators


def main() -> None:
    """Both runs, the comparison, the line."""
    args = arguments()
    for program in ("relion_refine_mpi", "mpirun"):
        if not shutil.which(program):
            raise SystemExit(f"{program} is not on the PATH: install Debian's package relion (and openmpi-bin), or bring RELION's own")
    folder = (args.output or Path(tempfile.mkdtemp(prefix="frazil-against-relion-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    particles = float32_copy(args.particles, folder, args.subset)
    truth = job.model_density(folder)
    reference = folder / "reference.mrc"
    n = job.count(particles)
    ours = job.run_frazil(particles, reference, folder / "frazil", args)
    print(f"frazil: {n} particles in {ours['seconds']:.1f} s, {ours['iterations']} iterations, {ours['memory_gb']:.2f} GB")
    theirs = run_relion(particles, reference, folder / "relion", args)
    ended = "stopped" if theirs["stopped"] else "finished"
    print(f"RELION: {ended} after {theirs['seconds']:.1f} s, {theirs['iterations']} iterations, {theirs['memory_gb']:.2f} GB")
    line: dict[str, Any] = {
        "bench": "against_relion", "shape": {"particles": str(args.particles), "n": n, "box": truth.shape[-1], "relion": relion_version()},
        "frazil": {**ours, **job.quality(folder / "frazil", truth)}, "relion": theirs,
        "ratio": round(theirs["seconds"] / ours["seconds"], 2), "ratio_is_lower_bound": theirs["stopped"],
        **job.surroundings(args.device, args.threads),
    }  # fmt: skip
    if not theirs["stopped"]:
        line["relion"] |= job.quality(folder / "relion", truth)
        line["agreement"] = agreement(folder / "frazil", folder / "relion")
    job.append("against_relion", line)
    report(line)


def arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=Path, default=job.DATA / "particles.star")
    parser.add_argument("--subset", type=int, default=0, help="use this many particles, spread over the file (default: all)")
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which RELION is stopped")
    parser.add_argument("--device", default="cpu", help="where frazil computes; RELION's is the CPU")
    parser.add_argument("--threads", type=int, default=2, help="frazil's threads; RELION has two working processes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None, help="new folder to keep both runs in (default: a temporary one)")
    return parser.parse_args()


def float32_copy(particles: Path, folder: Path, subset: int) -> Path:
    """particles.star in `folder` with float32 copies of the images it names, only these, a stack a stack."""
    star = read_star(particles)
    table = star["particles"]
    if 0 < subset < len(table):
        table = table.iloc[torch.linspace(0, len(table) - 1, subset).round().long().tolist()].reset_index(drop=True)
    (folder / "stacks").mkdir(exist_ok=True)
    place, stack = zip(*(name.split("@") for name in table["rlnImageName"]), strict=True)
    new = [""] * len(table)
    pixel_size = float(star["optics"]["rlnImagePixelSize"].iloc[0])
    for number, name in enumerate(dict.fromkeys(stack)):
        rows = [i for i, s in enumerate(stack) if s == name]
        images = read_stack(particles.parent / name)[[int(place[i]) - 1 for i in rows]]
        write_mrc(folder / "stacks" / f"{number:04d}.mrcs", images, pixel_size, stack=True)
        for k, i in enumerate(rows):
            new[i] = f"{k + 1:06d}@stacks/{number:04d}.mrcs"
    write_star(folder / "particles.star", {"optics": star["optics"], "particles": table.assign(rlnImageName=new)})
    return folder / "particles.star"


def run_relion(particles: Path, reference: Path, output: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Time of RELION's auto-refinement with the bench's options, what it used, and whether the limit stopped it."""
    output.mkdir()
    options = (
        f"--i {particles.name} --o {output}/run --ref {reference} --ini_high 40 --firstiter_cc --auto_refine --split_random_halves "
        "--ctf --sym D2 --particle_diameter 200 --flatten_solvent --zero_mask --norm --scale --oversampling 1 --healpix_order 2 "
        "--auto_local_healpix_order 4 --offset_range 5 --offset_step 2 --low_resol_join_halves 40 --pad 2 --pool 3 --preread_images "
        f"--dont_combine_weights_via_disc --random_seed {args.seed} --j 1"
    )
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "3", "relion_refine_mpi", *options.split()]
    done = job.timed(command, limit=args.limit, cwd=particles.parent)
    if done["code"] and not done["stopped"]:
        raise SystemExit(f"RELION failed with code {done['code']}\n{done['error']}")
    numbers = [int(m[1]) for p in output.glob("run_it*_data.star") if (m := re.search(r"it(\d+)_", p.name))]
    return {"seconds": done["seconds"], "memory_gb": done["memory_gb"], "stopped": done["stopped"], "iterations": max(numbers, default=0)}


def agreement(ours: Path, theirs: Path) -> dict[str, Any]:
    """FSC between the final maps in the soft sphere, and angles between poses modulo D2, particles matched by name."""
    a, b = (read_map(run / "run_class001.mrc").data.double() for run in (ours, theirs))
    box = a.shape[-1]
    mask = soft_sphere(box, 0.42 * box, 0.06 * box).double()
    curve = fsc(a * mask, b * mask)
    poses = [job.rotations_by_name(run / "run_data.star") for run in (ours, theirs)]
    # Each program writes the paths in its own way; the stack's own name and the place in it are what both keep.
    short = [{name.split("@")[0] + "@" + Path(name).name: rotation for name, rotation in p.items()} for p in poses]
    common = sorted(set(short[0]) & set(short[1]))
    angle = rotation_angle(*(torch.stack([s[name] for name in common]) for s in short), operators("D2"))
    quantiles = torch.quantile(angle, torch.tensor([0.5, 0.9], dtype=angle.dtype))
    return {"fsc": [round(float(v), 4) for v in curve], "mean_fsc": round(float(curve[1:].mean()), 5), "particles": len(common),
            "median_angle": round(float(quantiles[0]), 3), "angle_90": round(float(quantiles[1]), 3)}  # fmt: skip


def relion_version() -> str:
    """What relion_refine says of itself."""
    told = subprocess.run(["relion_refine", "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version:?\s+(\S+)", told)
    return found[1] if found else "unknown"


def report(line: dict[str, Any]) -> None:
    """The figures a person wants."""
    bound = "more than " if line["ratio_is_lower_bound"] else ""
    print(f"RELION {line['shape']['relion']} takes {bound}{line['ratio']:.1f} times as long as frazil on {line['device']}")
    for name in ("frazil", "relion"):
        if "resolution" in line[name]:
            f = line[name]
            print(f"  {name:7s} {f['resolution']:.2f} Å, mean FSC of halves {f['mean_fsc']:.4f}, to the model {f['mean_fsc_model']:.4f}")
    if "agreement" in line:
        same = line["agreement"]
        angles = f"median {same['median_angle']:.2f}°, nine in ten below {same['angle_90']:.2f}°"
        print(f"  between them: mean FSC {same['mean_fsc']:.4f}; angles of {same['particles']} particles: {angles}")


if __name__ == "__main__":
    main()
