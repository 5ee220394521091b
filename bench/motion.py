"""Motion correction on simulated movies: accuracy and time, beside RELION and torch-motion-correction where these are installed.

    python bench/motion.py relion [--dose 1.2] [--movies 2] [--repeat 1]   ours and relion_run_motioncorr, the same LZW TIFF movies, one run
    python bench/motion.py single                               ours from open file to sums in memory, global and 5 × 5 patches
    python bench/motion.py teamtomo                             ours and torch-motion-correction on one of them, one run
    python bench/motion.py bound --dose 4.5                     what the movies allow: Cramér–Rao bound for a known image
    python bench/motion.py large --device cuda [--movie K3]     40 frames of 4096² and of a K3: time, stages, decoding (TIFF, else MRC)
    python bench/motion.py k3-superres [--pixel-size 0.5]       40 frames of 11,520 × 8,184: peak memory

Movies are kept in --folder, named after what simulates them, and used again. Errors are rms over frames, both axes together, in px, the
mean over frames removed (it is not observable): `global` of the track against the field's mean motion, `field` of all motion at 7 × 7
points. --write appends to results/motion.jsonl.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as frazil does: threads that wait do not take the cores from those that work
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from frazil.data import Optics  # noqa: E402
from frazil.io.movie_table import read_motion  # noqa: E402
from frazil.io.movies import open_movie, write_mrc_movie, write_tiff  # noqa: E402
from frazil.io.mrc import write_mrc  # noqa: E402
from frazil.maths.motion import total_shift  # noqa: E402
from frazil.simulate.movies import MovieSettings, drift_track, local_motion, simulate_movie  # noqa: E402
from frazil.steps.motion import MotionSettings, correct_motion  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT.parent / "shared" / "data" / "betagal_10204" / "5a1a.cif.gz"
OPTICS = Optics(1.0)
Row = dict[str, object]
Motion = Callable[[torch.Tensor], torch.Tensor]  # places (p, 2) → shifts (f, p, 2)


def movies(folder: Path, settings: list[MovieSettings]) -> list[Path]:
    """LZW TIFF movies of β-galactosidase, made where they are not there yet, and gain.mrc beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, volume = [], None
    for s in settings:
        path = folder / f"dose{round(10 * s.dose):03d}_seed{s.seed}.tif"  # RELION cuts names at their first dot
        paths.append(path)
        if path.exists() and (folder / "gain.mrc").exists():
            continue
        if volume is None:
            from frazil.io.models import density_from_model

            volume = density_from_model(MODEL, 256, OPTICS.pixel_size, b_factor=30.0)
        made = simulate_movie(volume, OPTICS, s)
        write_tiff(path, (made.counts(f).clamp(max=255).to(torch.uint8).numpy() for f in range(s.frames)))
        write_mrc(folder / "gain.mrc", made.gain, OPTICS.pixel_size)
    return paths


def errors(star: Path, s: MovieSettings) -> tuple[float, float]:
    """(global, field) rms errors in px of the motion in a STAR file, frazil's or RELION's."""
    found = read_motion(star)
    line = (torch.arange(7, dtype=torch.float64) + 0.5) / 7
    place = torch.cartesian_prod(line, line)
    truth = -(drift_track(s)[:, None] + local_motion(s, place))

    def rms(difference: torch.Tensor) -> float:
        return float((difference - difference.mean(0)).square().sum(-1).mean().sqrt())

    return rms(found.track - truth.mean(1)), rms(total_shift(found.track, found.coefficients, place) - truth)


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """(wall, CPU) seconds of a command run in a folder."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_list(folder: Path, paths: list[Path], name: str, pixel_size: float = OPTICS.pixel_size) -> None:
    """A movies.star of these movies."""
    rows = "\n".join(f"{p.name} 1" for p in paths)
    (folder / name).write_text(
        "\n# version 30001\n\ndata_optics\n\nloop_\n_rlnOpticsGroupName #1\n_rlnOpticsGroup #2\n_rlnMicrographOriginalPixelSize "
        "#3\n_rlnVoltage #4\n"
        f"_rlnSphericalAberration #5\n_rlnAmplitudeContrast #6\nog1 1 {pixel_size} 300 2.7 0.1\n\n# version "
        f"30001\n\ndata_movies\n\nloop_\n"
        f"_rlnMicrographMovieName #1\n_rlnOpticsGroup #2\n{rows}\n\n"
    )


def relion(args: argparse.Namespace) -> list[Row]:
    """Both programs on the same movies, same patches, two threads, one after the other; then with whole programs' times."""
    settings = [MovieSettings(dose=args.dose, seed=seed + 1) for seed in range(args.movies)]
    paths = movies(args.folder, settings)
    for copy in range(1, args.repeat):  # other names of the same files: what a movie costs once both programs have started
        for path in paths[: args.movies]:
            paths.append(path.with_name(f"{path.stem}_again{copy}.tif"))
            paths[-1].unlink(missing_ok=True)
            paths[-1].symlink_to(path.name)
    settings = settings * args.repeat
    write_list(args.folder, paths, "movies.star")
    threads, group = str(args.threads), max(1, round(4 / args.dose))
    for name in ("relion", "frazil"):
        shutil.rmtree(args.folder / name, ignore_errors=True)
    ours = [sys.executable, "-m", "frazil", "motion", "movies.star", "--output", "frazil", "--dose", str(args.dose), "--gain", "gain.mrc",
            "--threads", threads, "--quiet"]  # fmt: skip
    theirs = ["relion_run_motioncorr", "--i", "movies.star", "--o", "relion/", "--use_own", "--j", threads,
              "--patch_x", "5", "--patch_y", "5",
              "--bfactor", "150", "--gainref", "gain.mrc", "--dose_weighting", "--dose_per_frame", str(args.dose), "--preexposure", "0",
              "--grouping_for_ps", str(group)]  # fmt: skip
    os.environ["PYTHONPATH"] = str(ROOT / "src")
    rows: list[Row] = []
    programs = [("frazil", ours)] + ([("relion 3.1.3 --use_own", theirs)] if shutil.which(theirs[0]) else [])
    for name, command in programs:
        wall, cpu = timed(command, args.folder)
        found = [errors(args.folder / name.split()[0] / f"{p.stem}.star", s) for p, s in zip(paths, settings, strict=True)]
        row: Row = {"what": "motion", "program": name, "dose": args.dose, "shape": [24, 2048, 2048], "movies": len(paths),
                    "threads": args.threads,
                    "seconds_a_movie": wall / len(paths), "cpu_seconds_a_movie": cpu / len(paths),
                    "global_px": [round(e[0], 4) for e in found],
                    "field_px": [round(e[1], 4) for e in found]}  # fmt: skip
        if name == "frazil":
            events = [json.loads(line) for line in (args.folder / "frazil" / "events.jsonl").read_text().splitlines()]
            row["seconds_in_job"] = [e["seconds"] for e in events if e.get("event") == "movie"]
        rows.append(row)
    return rows


def single(args: argparse.Namespace) -> list[Row]:
    """One movie from the page cache: decoding, alignment, sum, spectrum; the best of five after one that compiles."""
    from frazil.io.gain import read_gain

    path = movies(args.folder, [MovieSettings(dose=args.dose)])[0]
    gain, best = read_gain(args.folder / "gain.mrc"), (0.0, 0.0)
    for attempt in range(6):
        start, cpu = time.perf_counter(), time.process_time()
        correct_motion(open_movie(path, threads=args.threads), OPTICS, MotionSettings(dose=args.dose), gain=gain, device=args.device)
        taken = (time.perf_counter() - start, time.process_time() - cpu)
        best = min(best, taken) if attempt > 1 else taken
    return [{"what": "motion_single", "dose": args.dose, "shape": [24, 2048, 2048], "threads": args.threads, "device": args.device,
             "seconds": best[0], "cpu_seconds": best[1]}]  # fmt: skip


def bound(args: argparse.Namespace) -> Iterator[Row]:
    """What the simulated movies allow: Cramér–Rao bound of a frame's shift, both axes, the noise-free image known and nothing else.

    1 / variance along an axis = dose a² Σ_k (2π k)²/2 |F(k)|², F of the expected image of the frame (mean 1); k to `detail` Å.
    """
    from frazil.io.models import density_from_model

    volume = density_from_model(MODEL, 256, OPTICS.pixel_size, b_factor=30.0)
    for frames in (24, 10):
        s = MovieSettings(dose=args.dose, frames=frames)
        made = simulate_movie(volume, OPTICS, s)
        k2 = torch.fft.fftfreq(s.height)[:, None].square() + torch.fft.rfftfreq(s.width).square()
        twice = torch.full((1, s.width // 2 + 1), 2.0)
        twice[:, [0, -1]] = 1
        for detail in (5.0, 2.0):
            errors = []
            for f in range(frames):
                power = torch.fft.rfft2(made.clean(f) - 1, norm="ortho").abs().square() * twice * (k2 <= (OPTICS.pixel_size / detail) ** 2)
                information = s.dose * OPTICS.pixel_size**2 * 2 * math.pi**2 * float((power * k2).double().sum())
                errors.append(math.sqrt(2 / information))
            yield {"what": "motion_bound", "dose": s.dose, "frames": frames, "detail": detail, "first_px": round(errors[0], 4),
                   "last_px": round(errors[-1], 4), "rms_px": round(math.sqrt(sum(e * e for e in errors) / frames), 4)}  # fmt: skip


def teamtomo(args: argparse.Namespace) -> Iterator[Row]:
    """torch-motion-correction beside ours on the same frames: whole frames, then whole frames and patches, each up to the sum.

    Its estimate of whole frames is whole pixels against the middle frame; its main estimate refines a grid of splines by gradients, here
    with its own defaults (100 steps of Adam, 300 to 10 Å, overlapping patches) on five by five control points and six times.
    """
    import torch_motion_correction as other

    from frazil.io.gain import read_gain

    s = MovieSettings(dose=args.dose)
    path = movies(args.folder, [s])[0]
    torch.set_num_threads(args.threads)
    gain, movie = read_gain(args.folder / "gain.mrc"), open_movie(path, threads=args.threads)
    line = (torch.arange(7, dtype=torch.float64) + 0.5) / 7
    place = torch.cartesian_prod(line, line)
    truth = -(drift_track(s)[:, None] + local_motion(s, place))
    correct_motion(movie, OPTICS, MotionSettings(dose=s.dose), gain=gain)  # compiles
    for patches in ((1, 1), (5, 5)):
        start, cpu = time.perf_counter(), time.process_time()
        result = correct_motion(movie, OPTICS, MotionSettings(patches=patches, dose=s.dose), gain=gain)
        spent = time.perf_counter() - start, time.process_time() - cpu
        yield _team_row(s, f"frazil, patches {patches[0]} {patches[1]}, from the file to the sum", spent,
                        total_shift(result.track, result.coefficients, place) - truth)  # fmt: skip
    frames = movie.load(0, s.frames).float() * gain
    times = torch.linspace(0, 1, s.frames)
    at = torch.cat([times.repeat_interleave(len(place))[:, None], place.flip(-1).float().repeat(s.frames, 1)], -1)  # t, y, x

    def found(field: Any) -> torch.Tensor:
        """Its field as our shifts, by whichever sign agrees."""
        with torch.no_grad():
            shift = field(at).double().reshape(s.frames, len(place), 2).flip(-1) / OPTICS.pixel_size
        return min((shift - truth, -shift - truth), key=_spread)

    start, cpu = time.perf_counter(), time.process_time()
    field = other.estimate_global_motion(frames, OPTICS.pixel_size)
    whole = time.perf_counter() - start, time.process_time() - cpu
    yield _team_row(s, "torch-motion-correction, whole frames, estimate only", whole, found(field))
    start, cpu = time.perf_counter(), time.process_time()
    patch = other.PatchSamplingConfig(patch_shape=(512, 512))
    local, _ = other.estimate_local_motion(frames, OPTICS.pixel_size, (6, 5, 5), patch, initial_deformation_field=field)
    other.correct_motion(frames, local, OPTICS.pixel_size).sum(0)
    both = whole[0] + time.perf_counter() - start, whole[1] + time.process_time() - cpu
    yield _team_row(s, "torch-motion-correction, whole frames and patches, from frames in memory to the sum", both, found(local))


def _team_row(s: MovieSettings, program: str, spent: tuple[float, float], error: torch.Tensor) -> Row:
    return {"what": "motion_teamtomo", "dose": s.dose, "shape": [s.frames, s.height, s.width], "program": program, "seconds": spent[0],
            "cpu_seconds": spent[1], "global_px": round(_spread(error.mean(1)), 4), "field_px": round(_spread(error), 4)}  # fmt: skip


def _spread(difference: torch.Tensor) -> float:
    return float((difference - difference.mean(0)).square().sum(-1).mean().sqrt())


STAGES = {"decode, upload, add up": "_add_up", "bad pixels": "find_bad_pixels", "transforms": "_reduce", "whole frames": "correlate_track",
          "patches": "make_patches", "fit": "fit_motion", "power spectrum": "movie_spectrum", "sum": "_sum", "back": "_binned"}  # fmt: skip


@contextmanager
def stages(device: str) -> Iterator[dict[str, float]]:
    """Seconds of each stage of a step, the device waited for at its ends (which the step itself does not)."""
    from frazil.steps import motion as step

    spent: dict[str, float] = {}
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def timing(name: str, work: Callable[..., object]) -> Callable[..., object]:
        def inside(*args: object, **options: object) -> object:
            wait()
            start = time.perf_counter()
            result = work(*args, **options)
            wait()
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
            return result

        return inside

    before = {function: getattr(step, function) for function in STAGES.values()}
    for name, function in STAGES.items():
        setattr(step, function, timing(name, before[function]))
    try:
        yield spent
    finally:
        for function, work in before.items():
            setattr(step, function, work)


def large(args: argparse.Namespace) -> Iterator[Row]:
    """40 frames of shifted texture in counting noise, with the answer checked; from the page cache. One failing does not stop the other."""
    for name, height, width in (("4096", 4096, 4096), ("K3", 4092, 5760)):
        if args.movie not in ("all", name):
            continue
        try:
            yield _large(args, name, height, width)
        except Exception as error:  # noqa: BLE001 (the other movie is to be measured all the same)
            traceback.print_exc()
            yield {"what": "motion_large", "movie": name, "device": args.device, "failed": f"{type(error).__name__}: {error}"[:300]}


def _large(args: argparse.Namespace, name: str, height: int, width: int) -> Row:
    start = time.perf_counter()
    path, truth = _texture_movie(args.folder, height, width, 40, args.device)
    made = time.perf_counter() - start
    movie, settings = open_movie(path, threads=args.threads), MotionSettings(dose=1.0)
    decode, upload = _best(lambda: movie.load(0, 40)), 0.0
    if args.device.startswith("cuda"):
        frames = movie.load(0, 40)
        upload = _best(lambda: (frames.to(args.device), torch.cuda.synchronize()))
        del frames
        torch.cuda.reset_peak_memory_stats()
    correct_motion(movie, OPTICS, settings, device=args.device)  # compiles, plans transforms
    result, whole = None, math.inf
    for _ in range(args.runs):
        start = time.perf_counter()
        result = correct_motion(movie, OPTICS, settings, device=args.device)  # its sum is in main memory: nothing is left to wait for
        whole = min(whole, time.perf_counter() - start)
    with stages(args.device) as spent:
        correct_motion(movie, OPTICS, settings, device=args.device)
    assert result is not None
    errors = _off(result.track, result.coefficients, truth)
    assert errors["field_px"] < 0.15, f"{name}: field off by {errors['field_px']:.2f} px"
    gpu = torch.cuda.max_memory_allocated() / 1e9 if args.device.startswith("cuda") else 0.0
    return {"what": "motion_large", "movie": name, "container": path.suffix, "shape": [40, height, width], "device": args.device,
            "threads": args.threads, "seconds": whole, "decode_alone": decode, "upload_alone": upload, "decode_share": decode / whole,
            "stages": {key: round(value, 3) for key, value in spent.items()}, "gpu_gb": gpu, **errors,
            "local": result.coefficients is not None, "making_the_movie": round(made, 1)}  # fmt: skip


def _best(work: Callable[[], object], times: int = 3) -> float:
    """The shortest of some runs in seconds."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def _texture_movie(
    folder: Path, height: int, width: int, frames: int, device: str = "cpu", super_resolution: bool = False
) -> tuple[Path, Motion]:
    """Counts of a low-passed texture that drifts by 8 px and moves locally by up to 1.5; LZW TIFF where tifffile and imagecodecs are there,
    else MRC (int8), which needs no decoding: what is measured then says nothing of LZW. Returned with the true shifts at places.

    super_resolution: a count falls on one of the four quarters of its pixel; height and width are those of the camera.
    """
    folder.mkdir(parents=True, exist_ok=True)
    s = MovieSettings(height, width, frames)
    fine = 2 if super_resolution else 1

    def truth(place: torch.Tensor) -> torch.Tensor:
        return -fine * (drift_track(s)[:, None] + local_motion(s, place))

    try:
        import imagecodecs  # noqa: F401
        import tifffile  # noqa: F401

        ending = ".tif"
    except ImportError:
        ending = ".mrcs"
    path = folder / f"texture_{fine * width}x{fine * height}{ending}"
    if path.exists():
        return path, truth
    rng = torch.Generator(device).manual_seed(1)
    ft = torch.fft.rfft2(torch.randn(height, width, generator=rng, device=device))
    ft *= torch.exp(-60 * (torch.fft.fftfreq(height, device=device)[:, None].square() + torch.fft.rfftfreq(width, device=device).square()))
    texture = torch.fft.irfft2(ft, s=(height, width))
    texture = 1 + texture * (0.08 / float(texture.std()))
    line = torch.linspace(0, 1, 33, dtype=torch.float64)
    places = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)
    coarse = (drift_track(s)[:, None] + local_motion(s, places)).float().reshape(frames, 33, 33, 2).permute(0, 3, 1, 2).to(device)
    y, x = ((torch.arange(side, device=device) + 0.5) * (2 / side) - 1 for side in (height, width))

    def frame(f: int) -> np.ndarray:
        moved = torch.nn.functional.interpolate(coarse[f : f + 1], (height, width), mode="bilinear", align_corners=True)[0]
        at = torch.stack([x - moved[0] * (2 / width), y[:, None] - moved[1] * (2 / height)], -1)
        rate = torch.nn.functional.grid_sample(texture[None, None], at[None], padding_mode="reflection", align_corners=False)[0, 0]
        counts = torch.poisson(rate.clamp(min=0), generator=rng).clamp(max=127).to(torch.uint8)
        if super_resolution:
            quarter = torch.randint(0, 4, counts.shape, generator=rng, device=device)
            counts = torch.stack([counts * (quarter == q) for q in range(4)]).reshape(2, 2, height, width).permute(2, 0, 3, 1)
            counts = counts.reshape(2 * height, 2 * width)
        return counts.cpu().numpy()

    if ending == ".tif":
        write_tiff(path, (frame(f) for f in range(frames)))
    else:
        write_mrc_movie(path, np.stack([frame(f).astype(np.int8) for f in range(frames)]), 1.0)
    return path, truth


def _off(track: torch.Tensor, coefficients: torch.Tensor | None, truth: Motion) -> dict[str, float]:
    """Errors as `errors` has them."""
    line = (torch.arange(7, dtype=torch.float64) + 0.5) / 7
    place = torch.cartesian_prod(line, line)
    off = total_shift(track, coefficients, place) - truth(place)
    return {"global_px": round(_spread(off.mean(1)), 4), "field_px": round(_spread(off), 4)}


def k3_superres(args: argparse.Namespace) -> Iterator[Row]:
    """Peak memory and time of `frazil motion` on a 40-frame super-resolution movie, binned twice, in a process of its own."""
    start = time.perf_counter()
    path, truth = _texture_movie(args.folder, 4092, 5760, 40, args.device, super_resolution=True)
    made = time.perf_counter() - start
    write_list(args.folder, [path], "superres.star", args.pixel_size)
    shutil.rmtree(args.folder / "superres", ignore_errors=True)
    command = [sys.executable, "-m", "frazil", "motion", "superres.star", "--output", "superres", "--dose", "1", "--bin", "2", "--quiet",
               "--threads", str(args.threads), "--device", args.device]  # fmt: skip
    os.environ["PYTHONPATH"] = str(ROOT / "src")
    wall, cpu = timed(command, args.folder)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9  # of the largest child; there was no other
    found = read_motion(args.folder / "superres" / f"{path.stem}.star")
    yield {"what": "motion_k3_superres", "container": path.suffix, "shape": [40, 8184, 11520], "pixel_size": args.pixel_size,
           "threads": args.threads, "seconds": wall,
           "cpu_seconds": cpu, "peak_gb": peak, "local": found.coefficients is not None, "making_the_movie": round(made, 1),
           **_off(found.track, found.coefficients, truth)}  # fmt: skip


def main() -> None:
    """Run one of the benches and print, with --write also append, its rows."""
    works = {"relion": relion, "single": single, "teamtomo": teamtomo, "bound": bound, "large": large, "k3-superres": k3_superres}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=works)
    made_by = hashlib.sha256((ROOT / "src" / "frazil" / "simulate" / "movies.py").read_bytes()).hexdigest()[:8]
    parser.add_argument("--folder", type=Path, default=Path(f"/tmp/frazil-bench-motion-{made_by}"))
    parser.add_argument("--dose", type=float, default=1.2)
    parser.add_argument("--movies", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1, help="list each movie so many times")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--movie", choices=("all", "4096", "K3"), default="all", help="of `large`")
    parser.add_argument("--pixel-size", type=float, default=0.5, help="in Å, of `k3-superres`: larger pixels need more frequencies")
    parser.add_argument("--runs", type=int, default=3, help="of `large`: the best of so many counts")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    described = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    commit = described.stdout.strip()
    cpu = f"{platform.processor() or platform.machine()} x{args.threads}"
    machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else cpu
    for row in works[args.work](args):
        full = {"commit": commit, "machine": machine, "load": os.getloadavg()[0], **row}
        print(json.dumps(full), flush=True)
        if args.write:
            with open(ROOT / "bench" / "results" / "motion.jsonl", "a") as file:
                file.write(json.dumps(full) + "\n")


if __name__ == "__main__":
    main()
