"""Speed of picking: `PYTHONPATH=src python bench/pick.py [--device cuda] [--micrographs 100] [--size 4096] [--lowpass 20 0]`.

`--micrographs 5 --lowpass 0` is the short run without a filter.

Simulated micrographs (8 templates, known positions) are written once to --folder and read from the page cache. Correctness first: picks on
the device against those of the CPU in a crop, and recall against truth. Then, for each low-pass: seconds a micrograph end to end (reading,
matching, peaks, STAR, PNG, as `frazil pick` does it), the job's own seconds by stage, and the device alone: each stage ended by waiting for
it, and all together without. Lines go to bench/results/pick.jsonl.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from frazil.data import Optics  # noqa: E402
from frazil.io.micrographs import read_micrograph, read_micrographs  # noqa: E402
from frazil.io.mrc import write_mrc  # noqa: E402
from frazil.io.star import read_star  # noqa: E402
from frazil.maths.fourier import image_from_ft  # noqa: E402
from frazil.maths.peaks import highest_apart, match_points  # noqa: E402
from frazil.ops.dispatch import set_threads  # noqa: E402
from frazil.simulate.micrographs import MicrographSettings, grey_scale, simulate_micrograph, slices, view_rotations  # noqa: E402
from frazil.simulate.phantom import phantom  # noqa: E402
from frazil.steps.pick import PickSettings, candidates, make_bank, match, prepare  # noqa: E402

PIXEL, BOX, VIEWS = 1.77, 128, 8
LEVEL = 4.0  # z of a pick; candidates are kept down to one less, as `frazil pick` does
RESULTS = Path(__file__).resolve().parent / "results" / "pick.jsonl"


def main() -> None:
    """Simulate, check, time."""
    args = arguments()
    set_threads(args.threads)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="frazil-pick-"))
    source = phantom(BOX, PIXEL, "C1", 1)
    settings = MicrographSettings((args.size, args.size), source.diameter(), int(250 * (args.size / 4096) ** 2) + 10, 0.05, VIEWS, seed=1)
    star = simulate(folder, source, settings, args)
    check(star, settings, args)
    for lowpass in args.lowpass:
        line = timed(star, folder, settings, lowpass, args)
        print(json.dumps(line), flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        with open(RESULTS, "a") as file:
            file.write(json.dumps(line) + "\n")


def arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--micrographs", type=int, default=100)
    parser.add_argument("--distinct", type=int, default=2, help="simulated ones; the rest are copies, as reading and matching do not care")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--lowpass", type=float, nargs="+", default=[20.0])
    parser.add_argument("--folder", type=Path)
    return parser.parse_args()


def simulate(folder: Path, source: Any, settings: MicrographSettings, args: argparse.Namespace) -> Path:
    """Micrographs, truth and templates in a folder; the STAR file of the micrographs."""
    folder.mkdir(parents=True, exist_ok=True)
    optics = Optics(PIXEL, BOX)
    pictures = grey_scale(source, optics, settings) * image_from_ft(slices(source, view_rotations(settings), optics), BOX)
    write_mrc(folder / "templates.mrcs", pictures, PIXEL, stack=True)
    rows, truth = [], []
    for i in range(args.micrographs):
        path = folder / f"mic{i:03d}.mrc"
        if i < args.distinct:
            made = simulate_micrograph(source, optics, settings, i)
            truth.append((made.xy, made.defocus))
            write_mrc(path, made.image, PIXEL)
        else:
            path.write_bytes((folder / f"mic{i % args.distinct:03d}.mrc").read_bytes())
        rows.append(f"{path} 1 {' '.join(str(float(v)) for v in truth[i % args.distinct][1])}")
    torch.save([xy for xy, _ in truth], folder / "truth.pt")
    labels = "\n".join(f"_{name}" for name in ("rlnMicrographName", "rlnOpticsGroup", "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"))
    (folder / "micrographs.star").write_text(
        "data_optics\n\nloop_\n_rlnOpticsGroupName\n_rlnOpticsGroup\n_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\n"
        f"_rlnMicrographPixelSize\nopticsGroup1 1 300 2.7 0.1 {PIXEL}\n\ndata_micrographs\n\nloop_\n{labels}\n" + "\n".join(rows) + "\n"
    )
    return folder / "micrographs.star"


def picks_of(star: Path, settings: MicrographSettings, lowpass: float, device: str, crop: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Positions and FOM in the first micrograph, or a corner of it."""
    found = read_micrographs(star)
    image = read_micrograph(found.file(0))
    image = image[:crop, :crop].contiguous() if crop else image
    from frazil.io.mrc import read_stack

    bank = make_bank(read_stack(star.parent / "templates.mrcs").to(device), PIXEL, (image.shape[0], image.shape[1]), PIXEL,
                     PickSettings(settings.diameter, lowpass, score="z"))  # fmt: skip
    ready = prepare(image.to(device), bank, found.optics_of(0), found.defocus[0].to(device))
    picks = candidates(match(ready, bank), LEVEL, 0.1 * settings.diameter, 1.1, distance=0.65 * settings.diameter)
    kept = highest_apart(picks.xy.numpy(), picks.value.double().numpy(), 0.65 * settings.diameter / PIXEL)
    return picks.xy.numpy()[kept], picks.value.numpy()[kept]


def check(star: Path, settings: MicrographSettings, args: argparse.Namespace) -> None:
    """Device against the CPU's reference implementation in a crop; recall and false discovery rate against the truth."""
    os.environ["FRAZIL_OPS"] = "reference"
    exact, _ = picks_of(star, settings, 20.0, "cpu", 1024)
    del os.environ["FRAZIL_OPS"]
    xy, value = picks_of(star, settings, 20.0, args.device, 1024)
    same = match_points(xy, value.astype(float), exact, 1.0).gains.sum()
    share = 2 * same / max(1, len(xy) + len(exact))
    print(f"{args.device} against reference: {len(xy)} and {len(exact)} picks, {100 * share:.2f} % the same")
    if share < 0.99:
        sys.exit("picks differ from the reference")
    truth = torch.load(star.parent / "truth.pt", weights_only=True)[0].numpy()
    for lowpass in args.lowpass:
        xy, value = picks_of(star, settings, lowpass, args.device)
        pairs = match_points(xy, value.astype(float), truth, 62 / PIXEL).gains
        best = pairs[np.argsort(-value)][: len(truth)].sum()
        false = 1 - pairs.sum() / max(1, len(xy))
        print(f"low-pass {lowpass:g} Å: {len(xy)} picks, recall {pairs.sum() / len(truth):.3f}, FDR {false:.3f}, "
              f"recall of the best {len(truth)}: {best / len(truth):.3f}")  # fmt: skip


def timed(star: Path, folder: Path, settings: MicrographSettings, lowpass: float, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a micrograph: `frazil pick` from its first to its last micrograph, and the device's part."""
    from frazil.io.mrc import read_stack
    from frazil.jobs.pick import Params
    from frazil.jobs.pick import run as job
    from frazil.jobs.pick_files import Spent
    from frazil.jobs.run import Options, Run

    found, device = read_micrographs(star), torch.device(args.device)
    image = read_micrograph(found.file(0))
    image = image.pin_memory() if device.type == "cuda" else image
    budget = int(0.4 * torch.cuda.mem_get_info()[0]) if device.type == "cuda" else 3 << 29
    bank = make_bank(read_stack(star.parent / "templates.mrcs").to(device), PIXEL, (args.size, args.size), PIXEL,
                     PickSettings(settings.diameter, lowpass, score="z", cache_bytes=budget))  # fmt: skip

    defocus = found.defocus[0].to(device)

    def work(spent: Spent | None = None) -> None:
        """The device's part of a micrograph; it ends with its candidates in main memory."""
        assert bank is not None

        def over(name: str) -> None:
            if spent is not None:
                if device.type == "cuda":
                    torch.cuda.synchronize()
                spent.on(name)

        pixels = image.to(device, non_blocking=True)
        over("upload")
        ready = prepare(pixels, bank, found.optics_of(0), defocus)
        over("prepare")
        scores = match(ready, bank)
        over("match")
        candidates(scores, LEVEL - 1, 15.0, 1.1, distance=0.65 * settings.diameter)
        over("peaks")

    work()  # compiles
    repeats = 10 if device.type == "cuda" else 2
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    alone = (time.perf_counter() - start) / repeats
    spent = Spent()
    for _ in range(repeats):
        work(spent)
    stages = {name: round(seconds / repeats, 5) for name, seconds in spent.seconds.items()}
    bank = None  # its memory is the job's now
    out = Path(tempfile.mkdtemp(prefix="pick-", dir=folder))
    params = Params(micrographs=star, templates=folder / "templates.mrcs", diameter=settings.diameter, lowpass=lowpass)
    with Run("pick", params, Options(output=out / "run", device=args.device, threads=args.threads, quiet=True)) as run:
        start, cpu = time.perf_counter(), time.process_time()
        job(params, run)
        total, used = time.perf_counter() - start, time.process_time() - cpu
    events = [json.loads(line) for line in (out / "run" / "events.jsonl").read_text().splitlines()]
    job_stages = {k: v for k, v in next(e for e in events if e["event"] == "seconds").items() if isinstance(v, float)}
    picks = sum(read_star(out / "run" / "summary.star")[""]["rlnGroupNrParticles"])
    return {"bench": "pick", "lowpass": lowpass, "shape": [args.micrographs, args.size, args.size], "templates": VIEWS, "rotations": 72,
            "seconds_end_to_end": round(total / args.micrographs, 4), "seconds_job": round(total, 2),
            "cpu_seconds_each": round(used / args.micrographs, 3), "seconds_device": round(alone, 4), "seconds_device_stages": stages,
            "seconds_job_stages": job_stages,
            "picks": int(picks), "gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == "cuda" else peak_gb(),
            "threads": args.threads, "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
            "commit": commit()}  # fmt: skip


def peak_gb() -> float:
    """Largest resident memory of this process so far, GB."""
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


def commit() -> str:
    """Short name of the checked-out commit."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
