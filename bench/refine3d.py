"""Time the whole job on real particles: `python bench/refine3d.py [--device auto] [--threads 2]` → a line of results/refine3d.jsonl.

2,374 particles of beta-galactosidase (../shared/data/betagal_10204), D2, 200 Å, from the atomic model low-passed to 40 Å. RELION 5.0.1:
87.6 s on an H200, over 600 s on two CPU cores, 7.31 Å; mean FSC of shells 1–32 between its half maps 0.842, to the model 0.853.
The job is run as a user runs it, in a process of its own; start-up and writing count. Errors are those of the map: FSC of the half
maps and to the density of the model, in a soft sphere of radius 0.42 box, edge 0.06 box.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from frazil.io.models import density_from_model
from frazil.io.mrc import read_map, write_mrc
from frazil.io.star import read_star
from frazil.maths.fsc import fsc
from frazil.maths.masks import soft_sphere
from frazil.maths.rotation import euler_to_matrix

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = REPOSITORY.parent / "shared" / "data" / "betagal_10204"
RESULTS = REPOSITORY / "bench" / "results"


def main() -> None:
    """Run the job, measure it and append the line."""
    args = arguments()
    folder = args.output or Path(tempfile.mkdtemp(prefix="frazil-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    truth = model_density(folder)
    done = run_frazil(args.particles, folder / "reference.mrc", folder / "run", args)
    maps = quality(folder / "run", truth)
    line = {"bench": "refine3d", "shape": {"particles": str(args.particles), "n": count(args.particles), "box": truth.shape[-1]},
            **done, **maps, **surroundings(args.device, args.threads)}  # fmt: skip
    append("refine3d", line)
    print(f"{done['seconds']:.1f} s, {done['memory_gb']:.2f} GB, {done['iterations']} iterations, {maps['resolution']:.2f} Å")
    print(f"mean FSC of the halves {maps['mean_fsc']:.4f}, to the model {maps['mean_fsc_model']:.4f}; results in {folder / 'run'}")


def arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=Path, default=DATA / "particles.star")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None, help="new folder to keep the run in (default: a temporary one)")
    return parser.parse_args()


def model_density(folder: Path) -> Tensor:
    """(64, 64, 64) density of 5A1A on the particles' grid, written as reference.mrc."""
    volume = density_from_model(DATA / "5a1a.cif.gz", 64, 3.54)
    write_mrc(folder / "reference.mrc", volume.data, volume.pixel_size)
    return volume.data


def run_frazil(particles: Path, reference: Path, output: Path, args: argparse.Namespace, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """Seconds, peak memory (GB, host) and what the run says it used of the GPU, of `frazil refine3d` with the bench's options."""
    command = [
        sys.executable, "-m", "frazil", "refine3d", particles, "--reference", reference, "--initial-lowpass", 40, "--symmetry", "D2",
        "--diameter", 200, "--output", output, "--device", args.device, "--threads", args.threads, "--seed", args.seed, *extra,
    ]  # fmt: skip
    done = timed([str(c) for c in command])
    if done["code"]:
        raise SystemExit(f"frazil failed with code {done['code']}: see {output}\n{done['error']}")
    used = {name: done[name] for name in ("seconds", "memory_gb")}
    return {**used, "iterations": iterations(output), "gpu_memory_gb": gpu_memory(output)}


def timed(command: list[str], limit: float = 0, cwd: Path | None = None) -> dict[str, Any]:
    """Run a command; seconds, peak resident memory of it and its children in GB, exit code, whether it met the limit in s (0: none)."""
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    start, peak, over = time.monotonic(), 0, False
    with tempfile.TemporaryFile("w+") as errors:
        process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=env, cwd=cwd)
        ended = threading.Event()
        waiter = threading.Thread(target=lambda: (process.wait(), ended.set()), daemon=True)
        waiter.start()
        while not ended.wait(0.1):
            peak = max(peak, resident(process))
            if limit and time.monotonic() - start > limit:
                over = True
                for child in [*process.children(recursive=True), process]:
                    child.kill()
                ended.wait(10)
        seconds = time.monotonic() - start
        errors.seek(0)
        return {"seconds": round(seconds, 2), "memory_gb": round(peak / 1e9, 3), "code": process.returncode, "stopped": over,
                "error": errors.read()[-2000:]}  # fmt: skip


def resident(process: psutil.Process) -> int:
    """Bytes of resident memory of a process and its children; pages they share are counted once a process."""
    total = 0
    try:
        for one in [process, *process.children(recursive=True)]:
            total += one.memory_info().rss
    except psutil.Error:  # it ended while we looked
        return total
    return total


def iterations(output: Path) -> int:
    """Number of iterations of a run, by its events."""
    return sum(e.get("event") == "iteration" for e in events(output))


def gpu_memory(output: Path) -> float | None:
    """Largest GPU memory in GB that the run's events speak of, None without a GPU."""
    found = [e["gpu_memory_gb"] for e in events(output) if e.get("gpu_memory_gb")]
    return max(found) if found else None


def events(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's events.jsonl."""
    return [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]


def quality(run: Path, truth: Tensor) -> dict[str, Any]:
    """Resolution (unmasked half-map FSC 0.143), mean FSC of shells 1–N/2 of the halves and to the truth in the soft sphere."""
    halves = [read_map(run / f"run_half{h}_class001_unfil.mrc") for h in (1, 2)]
    final = read_map(run / "run_class001.mrc").data.double()
    box, pixel_size = final.shape[-1], halves[0].pixel_size
    mask = soft_sphere(box, 0.42 * box, 0.06 * box).double()
    a, b = (h.data.double() for h in halves)
    plain, inside, model = fsc(a, b), fsc(a * mask, b * mask), fsc(final * mask, truth.double() * mask)
    shell = first_below(plain, 0.143) - 1
    return {
        "resolution": round(box * pixel_size / shell, 3),
        "mean_fsc": round(float(inside[1:].mean()), 5),
        "mean_fsc_model": round(float(model[1:].mean()), 5),
        "fsc": [round(float(v), 4) for v in inside],
    }


def first_below(curve: Tensor, threshold: float) -> int:
    """First shell ≥ 1 where a curve is below a threshold; one past the last if it never is."""
    below = torch.nonzero(curve[1:] < threshold)
    return int(below[0]) + 1 if len(below) else len(curve)


def count(particles: Path) -> int:
    """Rows of a particle STAR file."""
    return len(read_star(particles)["particles"])


def surroundings(device: str, threads: int) -> dict[str, Any]:
    """Commit, device and time: what a figure is worth nothing without."""
    told = subprocess.run(["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    gpu = device != "cpu" and torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else f"{cpu_name()}, {threads} threads"
    return {"commit": told.stdout.strip() or None, "device": name, "load": round(os.getloadavg()[0], 2), "torch": torch.__version__,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # fmt: skip


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor()


def append(name: str, line: dict[str, Any]) -> None:
    """Add a measurement to results/<name>.jsonl."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def rotations_by_name(star: Path) -> dict[str, Tensor]:
    """rlnImageName → (3, 3) rotation of a particle STAR file."""
    table = read_star(star)["particles"]
    angles = torch.tensor(table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(), dtype=torch.float64)
    return dict(zip(table["rlnImageName"], euler_to_matrix(angles), strict=True))


if __name__ == "__main__":
    main()
