"""CTF estimation: accuracy on simulated and real micrographs, time on CPU and GPU.

    python bench/ctf.py simulated [--count 24]       defocus 0.3-4 µm, astigmatism 0-2000 Å, 20-40 e/Å²: bias, spread, angles
    python bench/ctf.py noise [--count 24]           counts without rings: how many are taken for a CTF, highest score
    python bench/ctf.py phase-plate [--count 12]     phase shifts 0-180° found together with the defocus
    python bench/ctf.py real                         power_spectra_10204 against CTFFIND, halves of apoferritin and Krios micrographs
    python bench/ctf.py detilt                       those halves with a plane through 3 x 3 patches taken out
    python bench/ctf.py time [--device cuda]         seconds of one 4096² micrograph from pixels to CTF, nothing else going on (latency);
                                                     on a GPU checked against the CPU first, with the fit there and on one CPU thread
    python bench/ctf.py job [--device cuda]          `frazil ctf` on --count 4096² micrographs in cached files: seconds each, files included

--write appends a line to results/ctf.jsonl. Everything but `real` makes its own data and needs torch and numpy only.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as frazil does, before torch is loaded
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from frazil.data import Optics  # noqa: E402
from frazil.steps.ctf import (  # noqa: E402
    CtfResult,
    CtfSettings,
    estimate_ctf,
    micrograph_spectrum,
    saved_spectrum,
    tile_bins,
    tile_layout,
)

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
PIXELS = (0.85, 1.0, 1.2)
Row = dict[str, object]


def found_in(image: torch.Tensor, optics: Optics, settings: CtfSettings) -> CtfResult:
    """The CTF of a micrograph."""
    return estimate_ctf(micrograph_spectrum(image, optics.pixel_size, settings), optics, settings)


def turned(angle: float) -> float:
    """An angle brought into [−90, 90)."""
    return (angle + 90) % 180 - 90


def simulated(args: argparse.Namespace, phase_plate: bool = False) -> Row:
    """Errors of the mean defocus, of astigmatism and of its angle."""
    from frazil.simulate.ctf import CtfMicrographSettings, simulate_ctf_micrograph

    rng = torch.Generator().manual_seed(args.seed)
    settings = CtfSettings(phase_plate=phase_plate)
    defocus, astigmatism, angles, phases, lost = [], [], [], [], 0
    for i in range(args.count):
        draw = torch.rand(5, generator=rng).tolist()
        optics = Optics(PIXELS[i % len(PIXELS)])
        mean = 3000 * (40000 / 3000) ** draw[0]  # as many below 1.1 µm as above
        size = min(2000 * draw[1], 2 * (mean - 1500))
        angle, phase = 180 * draw[2] - 90, 180 * draw[4] if phase_plate else 0.0
        truth = torch.tensor([mean + size / 2, mean - size / 2, angle], dtype=torch.float64)
        made = CtfMicrographSettings((args.side, args.side), dose=20 + 20 * draw[3], seed=args.seed * 1000 + i)
        result = found_in(simulate_ctf_micrograph(optics, made, truth, phase), optics, settings)
        u, v, turn = result.defocus.tolist()
        off = (u + v) / 2 - mean
        print(f"{optics.pixel_size} Å, {made.dose:.0f} e/Å²: defocus {mean:6.0f} {off:+6.1f} (expected {result.error[0]:.1f}), astigmatism "
              f"{size:5.0f} {u - v - size:+6.1f}, angle {angle:+4.0f} {turned(turn - angle):+5.2f}, rings to {result.resolution:.2f} Å"
              + (f", phase {phase:.0f} {turned(result.phase_shift - phase):+.1f}" if phase_plate else ""), flush=True)  # fmt: skip
        lost += not result.found
        defocus.append(off)
        astigmatism.append(u - v - size)
        phases.append(turned(result.phase_shift - phase))
        if size > 300:
            angles.append(abs(turned(turn - angle)))
    row: Row = {"what": "phase plate" if phase_plate else "simulated", "shape": [args.side, args.side], "count": args.count,
                "not_found": lost, "bias": statistics.mean(defocus), "sd": statistics.stdev(defocus), "worst": max(map(abs, defocus)),
                "astigmatism_bias": statistics.mean(astigmatism), "astigmatism_sd": statistics.stdev(astigmatism),
                "angle_rms": math.sqrt(statistics.mean(a * a for a in angles)), "angle_worst": max(angles)}  # fmt: skip
    return row | ({"phase_bias": statistics.mean(phases), "phase_sd": statistics.stdev(phases)} if phase_plate else {})


def noise(args: argparse.Namespace) -> Row:
    """How many micrographs without rings are taken for a CTF."""
    from frazil.simulate.ctf import CtfMicrographSettings, noise_micrograph

    results = []
    for i in range(args.count):
        made = CtfMicrographSettings((args.side, args.side), dose=20 + 20 * (i % 2), inelastic=(0.0, 0.03, 0.1)[i % 3], seed=args.seed + i)
        optics = Optics(PIXELS[i % len(PIXELS)])
        results.append(found_in(noise_micrograph(optics, made), optics, CtfSettings()))
    return {"what": "noise", "count": args.count, "shape": [args.side, args.side], "found": sum(r.found for r in results),
            "score_max": max(r.score for r in results), "fom_max": max(abs(r.fom) for r in results)}  # fmt: skip


def real(args: argparse.Namespace) -> list[Row]:
    """Agreement with CTFFIND; of halves: left and right, lower and upper, and pairs of diagonal quadrants, which a tilt leaves alike."""
    from frazil.io.mrc import read_mrc
    from frazil.io.star import read_star

    settings, rows = CtfSettings(), []
    table = read_star(DATA / "power_spectra_10204" / "reference_ctf.star")["micrographs"]
    mean, astigmatism = [], []
    for row in table.to_dict("records"):  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        saved = read_mrc(DATA / "power_spectra_10204" / str(row["rlnMicrographName"]).replace(".mrc", "_PS.mrc"))
        result = estimate_ctf(saved_spectrum(saved.data[0], saved.pixel_size, settings), Optics(0.885, 0, 200.0, 1.4), settings)
        u, v, _ = result.defocus.tolist()
        mean.append((u + v - row["rlnDefocusU"] - row["rlnDefocusV"]) / 2)
        astigmatism.append(u - v - row["rlnDefocusU"] + row["rlnDefocusV"])
    rows.append({"what": "power_spectra_10204", "median": statistics.median(map(abs, mean)), "worst": max(map(abs, mean)),
                 "astigmatism_median": statistics.median(map(abs, astigmatism))})  # fmt: skip
    images = sorted((DATA / "apoferritin_10146").glob("*.mrc")) + [Path(p) for p in args.images]
    for path in images:
        found = read_mrc(path)
        optics = Optics(found.pixel_size, cs=0.0 if "10146" in str(path) else 2.7)
        image = found.data[0]
        h, w = image.shape
        top, bottom, left, right = slice(0, h // 2), slice(h - h // 2, h), slice(0, w // 2), slice(w - w // 2, w)
        whole, *halves = (found_in(image[y, x], optics, settings) for y, x in
                          ((slice(None),) * 2, (slice(None), left), (slice(None), right), (top, slice(None)), (bottom, slice(None))))
        pairs = []
        for quadrants in (((top, left), (bottom, right)), ((top, right), (bottom, left))):
            a, b = (micrograph_spectrum(image[y, x], optics.pixel_size, settings) for y, x in quadrants)
            both = replace(a, tiles=torch.cat([a.tiles, b.tiles]), place=torch.zeros(len(a.tiles) + len(b.tiles), 2, dtype=torch.float64))
            pairs.append(estimate_ctf(both, optics, settings))
        m = [float(r.defocus[:2].mean()) for r in (*halves, *pairs)]
        slope = math.tan(math.radians(whole.tilt[0]))
        direction = math.radians(whole.tilt[2])
        expected = [-slope * side * optics.pixel_size / 2 * part for side, part in ((w, math.cos(direction)), (h, math.sin(direction)))]
        rows.append({"what": path.name, "defocus": float(whole.defocus[:2].mean()), "error": whole.error[0], "resolution": whole.resolution,
                     "fom": whole.fom, "tilt": list(whole.tilt), "left-right": m[0] - m[1], "expected_by_tilt": expected[0],
                     "lower-upper": m[2] - m[3], "expected_by_tilt_y": expected[1], "quadrants": m[4] - m[5],
                     "error_half": halves[0].error[0]})  # fmt: skip
    return rows


def plane_through(place: torch.Tensor, values: torch.Tensor, covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(parameters, their covariance, χ²) of values (n,) = a + place (n, d) · g by generalised least squares."""
    design = torch.cat([torch.ones(len(place), 1, dtype=torch.float64), place], 1)
    inverse = torch.linalg.inv(covariance)
    spread = torch.linalg.inv(design.T @ inverse @ design)
    found = spread @ design.T @ inverse @ values
    left = values - design @ found
    return found, spread, float(left @ inverse @ left)


def patches(image: torch.Tensor, optics: Optics, settings: CtfSettings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(places (9, 2) xy in Å, defocus (9,), covariance (9, 9)) of 3 x 3 windows of half the field's side, each half over the next.

    Their errors correlate as much as they have pixels in common.
    """
    h, w = image.shape
    starts = [(y, x) for y in (0, 1, 2) for x in (0, 1, 2)]
    found = [found_in(image[y * h // 4 : y * h // 4 + h // 2, x * w // 4 : x * w // 4 + w // 2], optics, settings) for y, x in starts]
    at = torch.tensor(starts, dtype=torch.float64)
    common = (1 - (at[:, None] - at).abs() / 2).clamp(min=0).prod(-1)
    error = torch.tensor([r.error[0] for r in found], dtype=torch.float64)
    place = (at.flip(1) - 1) * torch.tensor([w, h]) / 4 * optics.pixel_size
    return place, torch.tensor([float(r.defocus[:2].mean()) for r in found], dtype=torch.float64), common * error[:, None] * error


def detilt(args: argparse.Namespace) -> list[Row]:
    """Differences of halves before and after a plane through the patches is taken out; is it a plane, and the same in separate parts?

    `slopes`: what the left column of patches expects of a half against the other, and what the right one does (no pixel in common), each
    with its standard deviation; for both directions.
    """
    from frazil.io.mrc import read_mrc

    rows = []
    for path in sorted((DATA / "apoferritin_10146").glob("*.mrc")) + [Path(p) for p in args.images]:
        read = read_mrc(path)
        image, optics = read.data[0], Optics(read.pixel_size, cs=0.0 if "10146" in str(path) else 2.7)
        h, w = image.shape
        mean = float(found_in(image, optics, CtfSettings()).defocus[:2].mean())
        near = CtfSettings(low=max(1000.0, mean - 2000), high=mean + 2000)
        place, values, covariance = patches(image, optics, near)
        plane, spread, chi2 = plane_through(place, values, covariance)
        parts = ((image[:, : w // 2], image[:, w - w // 2 :]), (image[: h // 2], image[h - h // 2 :]))
        row: Row = {"what": f"detilt {path.name}", "chi2": chi2, "degrees_of_freedom": 6,
                    "tilt": math.degrees(math.atan(float(plane[1:].norm()))),
                    "tilt_sd": math.degrees(float((plane[1:] @ spread[1:, 1:] @ plane[1:]).sqrt() / plane[1:].norm()))}  # fmt: skip
        for axis, (name, side) in enumerate((("left-right", w), ("lower-upper", h))):
            reach = side / 2 * optics.pixel_size  # between the middles of the halves
            one, two = (found_in(part, optics, near) for part in parts[axis])
            before = float(one.defocus[:2].mean() - two.defocus[:2].mean())
            columns = [torch.nonzero(place[:, 1 - axis] * sign > 0)[:, 0] for sign in (-1, 1)]
            lines = [plane_through(place[c][:, axis, None], values[c], covariance[c][:, c]) for c in columns]
            row |= {name: before, f"{name} detilted": before + float(plane[1 + axis]) * reach,
                    f"{name} sd": math.hypot(one.error[0], two.error[0]),
                    f"{name} slopes": [[-float(g[1]) * reach, float(s[1, 1].sqrt()) * reach] for g, s, _ in lines]}  # fmt: skip
        rows.append(row)
    return rows


def timing(args: argparse.Namespace) -> Row:
    """Seconds a micrograph of counts (uint8), moved to the device each time; pictures and files are not in it."""
    from frazil.simulate.ctf import CtfMicrographSettings, simulate_ctf_micrograph

    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    optics, settings = Optics(1.0), CtfSettings()
    truth = torch.tensor([15400.0, 14900.0, 35.0], dtype=torch.float64)
    image = simulate_ctf_micrograph(optics, CtfMicrographSettings((4096, 4096), seed=3), truth).clamp(max=255).to(torch.uint8)
    side = tile_layout((4096, 4096), optics.pixel_size)[0]
    bins = {str(d): tile_bins(side, optics.pixel_size, settings, d) for d in {torch.device("cpu"), device}}

    def once(where: torch.device) -> CtfResult:
        return estimate_ctf(micrograph_spectrum(image, optics.pixel_size, settings, where, bins[str(where)]), optics, settings)

    row: Row = {"what": "time", "shape": [4096, 4096], "device": str(device), "threads": args.threads}
    here = once(device)
    if device.type == "cuda":
        there = once(torch.device("cpu"))
        row["difference_to_cpu"] = float((here.defocus - there.defocus).abs().max())
        if float((here.defocus - there.defocus)[:2].abs().max()) > 5:
            raise SystemExit(f"GPU and CPU differ: {here.defocus.tolist()} {there.defocus.tolist()}")
        image = image.pin_memory()
        row["gpu"] = torch.cuda.get_device_name()
    row["error"] = float(here.defocus[:2].mean() - truth[:2].mean())
    seconds, spectrum, beside, used = [], [], [], []
    for _ in range(args.repeats):
        start, cpu = time.perf_counter(), time.process_time()
        made = micrograph_spectrum(image, optics.pixel_size, settings, device, bins[str(device)])
        float(made.tiles.sum())
        spectrum.append(time.perf_counter() - start)
        estimate_ctf(made, optics, settings)
        seconds.append(time.perf_counter() - start)
        used.append(time.process_time() - cpu)
        torch.set_num_threads(1)
        start = time.perf_counter()
        estimate_ctf(made.on(bins["cpu"]), optics, settings)
        beside.append(time.perf_counter() - start)
        torch.set_num_threads(args.threads)
    return row | {"seconds": statistics.median(seconds), "seconds_best": min(seconds), "seconds_spectrum": statistics.median(spectrum),
                  "seconds_fit_on_one_cpu_thread": statistics.median(beside), "cpu_seconds": statistics.median(used)}  # fmt: skip


def cpu_seconds() -> float:
    """CPU seconds of this process, and of the server that forks the job's processes with all of these that have ended."""
    from multiprocessing import forkserver

    server, used = getattr(forkserver._forkserver, "_forkserver_pid", None), time.process_time()
    if server is not None:
        time.sleep(0.1)  # it has yet to hear of the last end
        fields = Path(f"/proc/{server}/stat").read_text().rsplit(")", 1)[1].split()
        used += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # its user and system time, and that of its children
    return used


def job(args: argparse.Namespace) -> Row:
    """Seconds a micrograph of `frazil ctf` with all its files, and where the main thread spent them; 2 different micrographs, copied."""
    from frazil.io.mrc import write_mrc
    from frazil.jobs.ctf import Params
    from frazil.jobs.ctf import run as work
    from frazil.jobs.run import Options, Run
    from frazil.simulate.ctf import CtfMicrographSettings, simulate_ctf_micrograph  # here: the job's processes import this module

    device, side = torch.device(args.device), args.side
    truths = [torch.tensor([15400.0, 14900.0, 35.0], dtype=torch.float64), torch.tensor([9400.0, 9100.0, -20.0], dtype=torch.float64)]
    with TemporaryDirectory(prefix="frazil-ctf-") as name:
        folder = Path(name)
        lines = ["data_optics\n\nloop_\n_rlnOpticsGroup\n_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\n"
                 "_rlnMicrographPixelSize\n1 300 2.7 0.1 1.0\n\ndata_micrographs\n\nloop_\n_rlnMicrographName\n"
                 "_rlnOpticsGroup"]  # fmt: skip
        for i, truth in enumerate(truths):
            made = simulate_ctf_micrograph(Optics(1.0), CtfMicrographSettings((side, side), seed=3 + i), truth)
            write_mrc(folder / f"mic{i:03d}.mrc", made, 1.0)
        for i in range(args.count):
            if i >= len(truths):
                (folder / f"mic{i:03d}.mrc").write_bytes((folder / f"mic{i % len(truths):03d}.mrc").read_bytes())
            lines.append(f"{folder}/mic{i:03d}.mrc 1")
        (folder / "micrographs.star").write_text("\n".join(lines) + "\n")
        if device.type == "cuda":  # loads libraries, as the first of many micrographs does
            micrograph_spectrum(torch.randn(side, side), 1.0, CtfSettings(), device)
        params = Params(micrographs=folder / "micrographs.star")  # pyright: ignore[reportCallIssue]
        options = Options(output=folder / "run", device=args.device, threads=args.threads, quiet=True)  # pyright: ignore[reportCallIssue]
        with Run("ctf", params, options) as run:
            start, cpu = time.perf_counter(), cpu_seconds()
            work(params, run)
            total, used = time.perf_counter() - start, cpu_seconds() - cpu
        events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
        found = {Path(e["name"]).name: e["defocus"] for e in events if e["event"] == "micrograph"}
        own = [e["cpu_seconds"] for e in events if e["event"] == "micrograph"]  # of the thread that had it
        stages = {k: v for k, v in next(e for e in events if e["event"] == "seconds").items() if isinstance(v, float)}
    off = max(abs(found[f"mic{i:03d}.mrc"] - float(truths[i % len(truths)][:2].mean())) for i in range(args.count))
    if off > 50:
        raise SystemExit(f"the defocus is off by {off:.0f} Å")
    return {"what": "job", "shape": [args.count, side, side], "device": str(device), "threads": args.threads, "worst_error": off,
            "seconds_each": total / args.count, "seconds_job": total, "cpu_seconds_each": used / args.count,
            "cpu_seconds_work": statistics.median(own), "stages": stages}  # fmt: skip


def main() -> None:
    """Run what the command line names and print a line of figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("simulated", "noise", "phase-plate", "real", "detilt", "time", "job"))
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--side", type=int, help="px; 2048 if not given, 4096 for job")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--images", nargs="*", default=[], help="further micrographs of 300 kV for `real` and `detilt`")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    args.side = args.side or (4096 if args.what == "job" else 2048)
    works = {"simulated": simulated, "noise": noise, "phase-plate": lambda a: simulated(a, True), "real": real, "detilt": detilt,
             "time": timing, "job": job}  # fmt: skip
    rows = works[args.what](args)
    for row in rows if isinstance(rows, list) else [rows]:
        asked = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        line = json.dumps({"commit": commit, "machine": platform.processor() or platform.machine(), **row})
        print(line)
        if args.write:
            with open(ROOT / "bench" / "results" / "ctf.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
