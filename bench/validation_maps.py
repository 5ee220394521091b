"""Masks, post-processing, local resolution: right, and how fast? `python bench/validation_maps.py [--device cuda] [--only ssnr noise …]`.

ssnr      half maps of known signal to noise: FSC beside SSNR/(1 + SSNR), fitted B-factor, amplitudes after division by the MTF
noise     half maps of pure noise in a tight mask: masked, random and corrected FSC; plot in docs/pictures
zones     two zones of known resolution in a 256³ map: medians, time on --device; with cuda also beside the CPU's result
large     500³: `frazil mask` with a 20 px edge and `frazil postprocess` as commands: wall, CPU seconds, peak memory
seeds     FSC of random phases: 40 seeds of RELION's program beside each other and beside ours (half maps in ../shared/data)
relion    half maps of --run (a refine3d directory) in RELION's programs and in frazil: curves, resolution, B-factor, mask volume

Each measurement is a line of bench/results/validation_maps.jsonl.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from frazil.io.mrc import read_map, write_mrc
from frazil.io.star import read_star
from frazil.jobs.plots import plot_fsc
from frazil.maths.filters import apply_to_ft, power_spectrum
from frazil.maths.fsc import fsc
from frazil.maths.masks import radii, soft_sphere
from frazil.steps.localres import LocalresParams, local_resolution
from frazil.steps.postprocess import PostprocessParams, compare_halves, mtf_at, postprocess

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results" / "validation_maps.jsonl"


def record(name: str, device: str, **values) -> None:
    """Print a measurement and append it to the results."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=REPOSITORY).stdout.strip() or None
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()} {torch.get_num_threads()} threads"
    line = {"bench": "validation_maps", "name": name, "commit": commit, "device": where, "load": round(os.getloadavg()[0], 1), **values}
    print(json.dumps(line), flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


def noise(box: int, generator: torch.Generator) -> Tensor:
    """White noise of variance 1."""
    return torch.randn(box, box, box, generator=generator)


def ssnr(device: str) -> None:
    """FSC, B-factor and MTF of maps made to be known."""
    box, a, draws, g = 128, 1.0, 12, torch.Generator().manual_seed(1)
    expected = 1 / (1 + 1 / (30 * torch.exp(-torch.arange(box // 2 + 1, dtype=torch.float64) / 9)))
    curves = []
    for _ in range(draws):
        signal = apply_to_ft(noise(box, g), lambda r: (30 * torch.exp(-r / 9)).sqrt()).to(device)
        curves.append(fsc(*(signal + noise(box, g).to(device) for _ in range(2))).cpu())
    error = (torch.stack(curves).mean(0) - expected)[3:].abs()
    record("ssnr: FSC", device, box=box, draws=draws, largest_error=round(float(error.max()), 4), bar=0.01)

    b, length = -120.0, box * a
    frequency = np.linspace(0, 1.0, 201)
    table = np.stack([frequency, np.sinc(frequency) * (1 - 0.3 * frequency)], 1)
    plain = apply_to_ft(noise(box, g), lambda r: torch.exp(b / 4 * (r / length).square()))
    blurred = apply_to_ft(plain, lambda r: mtf_at(table, r / box))
    halves = [(blurred + 0.002 * noise(box, g)).to(device) for _ in range(2)]
    found = postprocess(*halves, torch.ones_like(halves[0]), a, PostprocessParams(), (table, a))
    percent = round(abs(found.b_factor / b - 1) * 100, 2)
    record("ssnr: B-factor", device, true=b, found=round(found.b_factor, 2), error_percent=percent, bar=5)
    kept = PostprocessParams.model_validate({"b_factor": 0.0, "fsc_weighting": False})
    restored = postprocess(blurred.to(device), (blurred + 1e-6 * noise(box, g)).to(device), None, a, kept, (table, a)).data.cpu()
    ratio = (power_spectrum(restored) / power_spectrum(plain)).sqrt()[1 : box // 2 - 2]
    record("ssnr: MTF", device, largest_error_percent=round(float((ratio - 1).abs().max()) * 100, 3), bar=2)


def noise_halves(box: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(two half maps, tight mask): noise alone, independent but for shells up to 4, which a refinement joins between its halves."""
    g = torch.Generator().manual_seed(seed)
    joined = apply_to_ft(noise(box, g), lambda r: 25.0 * (r <= 4) * (r > 0))
    rough = apply_to_ft(noise(box, g), lambda r: (r < 20).double())
    tight = ((rough > 0) & (radii(box, 3) < 0.2 * box)).float()  # hard-edged, full of holes
    return joined + noise(box, g), joined + noise(box, g), tight


def pure_noise(device: str) -> None:
    """What a tight mask does to noise."""
    box, a = 128, 1.5
    first, second, tight = (x.to(device) for x in noise_halves(box, 2))
    found = postprocess(first, second, tight, a, PostprocessParams.model_validate({"force_mask": True}))
    start = (found.curves.randomise_from or 1) + 2
    masked, corrected = found.curves.masked[start:], found.curves.corrected[start:]
    record("pure noise in a tight mask", device, masked_mean=round(float(masked.mean()), 3), masked_max=round(float(masked.max()), 3),
           corrected_mean=round(float(corrected.mean()), 4), corrected_sd=round(float(corrected.std()), 4),
           warnings=list(found.warnings))  # fmt: skip
    names = ("unmasked", "masked", "randomised", "corrected")
    figure = plot_fsc({name: getattr(found.curves, name).cpu().numpy() for name in names}, box, a)
    figure.savefig(REPOSITORY / "docs" / "pictures" / "postprocess_noise.png", dpi=110)


def two_zones(box: int, first: float, second: float, seed: int = 1) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """(half maps of 1 Å, sphere, its zones): signal whose FSC is 0.143 at `first` Å where x < 0 and at `second` Å where x > 0."""
    g = torch.Generator().manual_seed(seed)

    def signal(resolution: float) -> Tensor:
        width = 0.12 / resolution
        return apply_to_ft(noise(box, g), lambda r: (0.143 / 0.857 * torch.exp(-(r / box - 1 / resolution) / width)).clamp(max=400).sqrt())

    x = (torch.arange(box) - box // 2).float()
    r = radii(box, 3)
    left = torch.sigmoid(-x)
    made = torch.sigmoid((0.4 * box - r) / 1.5) * (left * signal(first) + (1 - left) * signal(second))
    sphere = r < 0.4 * box
    return [made + noise(box, g) for _ in range(2)], sphere, [sphere & (x < 0), sphere & (x > 0)]


def zones(device: str, box: int) -> None:
    """Local resolution of the two zones, and how long it takes."""
    halves, _, parts = two_zones(box, 4.0, 8.0)
    mask = soft_sphere(box, 0.4 * box, 5)
    given = [x.to(device) for x in (*halves, mask)]
    times, cpu = [], 0.0
    for _ in range(3 if device.startswith("cuda") else 1):
        start, cpu = time.perf_counter(), time.process_time()
        found = local_resolution(*given, 1.0, LocalresParams())
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        cpu = time.process_time() - cpu
    medians = [round(float(found.resolution.cpu()[part].median()), 2) for part in parts]
    extra = {}
    if device.startswith("cuda"):
        reference = local_resolution(*halves, mask, 1.0, LocalresParams())
        extra = {"beside_cpu": float((found.resolution.cpu() - reference.resolution).abs().max()),
                 "filtered_beside_cpu": float((found.filtered.cpu() - reference.filtered).norm() / reference.filtered.norm())}  # fmt: skip
    record("zones", device, box=box, truth=[4.0, 8.0], medians=medians, bar=0.3, windows=len(found.points), side=found.side,
           seconds=[round(t, 2) for t in times], cpu_seconds=round(cpu, 1), **extra)  # fmt: skip


def large(device: str, box: int, threads: int) -> None:
    """The two commands on half maps of side `box`, files to files."""
    folder = Path(tempfile.mkdtemp(prefix="frazil-large-"))
    try:
        g = torch.Generator().manual_seed(3)
        signal = apply_to_ft(noise(box, g), lambda r: torch.exp(-40 * (r / box).square())) * soft_sphere(box, 0.3 * box, 10)
        for half in (1, 2):
            write_mrc(folder / f"half{half}.mrc", 3 * signal + 0.3 * noise(box, g) + soft_sphere(box, 0.3 * box, 10), 1.0)
        del signal
        common = ["--device", device, "--threads", str(threads), "--quiet"]
        mask = ["mask", folder / "half1.mrc", "--edge", "20", "--output", folder / "mask", *common]
        post = ["postprocess", folder / "half1.mrc", "--mask", folder / "mask" / "mask.mrc", "--output", folder / "post", *common]
        for name, command in (("mask", mask), ("postprocess", post)):
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            code = "import resource,sys; from frazil.cli import main; c = main(sys.argv[1:]); " \
                   "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20); sys.exit(c)"  # fmt: skip
            done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, check=False)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if done.returncode:
                raise SystemExit(done.stderr)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            record(f"large: {name}", device, box=box, seconds=round(time.perf_counter() - start, 1), cpu_seconds=round(cpu, 1),
                   gigabytes=round(float(done.stdout.split()[-1]), 2), bar=[20 if name == "mask" else 60, 8])  # fmt: skip
    finally:
        shutil.rmtree(folder)


def relion(run: Path) -> None:
    """The same half maps and mask in RELION's programs and in frazil's commands."""
    folder = Path(tempfile.mkdtemp(prefix="frazil-relion-"))

    def call(*words: object) -> None:
        done = subprocess.run([*map(str, words)], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode and "postprocess" not in str(words[0]):  # without ghostscript RELION's fails after writing everything
            raise SystemExit(done.stdout + done.stderr)

    for half in (1, 2):
        shutil.copy(run / f"run_half{half}_class001_unfil.mrc", folder)
    shutil.copy(run / "run_class001.mrc", folder)
    frazil = [sys.executable, "-m", "frazil"]
    call("relion_mask_create", "--i", "run_class001.mrc", "--o", "theirs.mrc", "--ini_threshold", 0.02, "--extend_inimask", 3,
         "--width_soft_edge", 6, "--lowpass", 15, "--angpix", 3.54)  # fmt: skip
    call(*frazil, "mask", "run_class001.mrc", "--threshold", 0.02, "--extend", 3, "--edge", 6, "--output", "mask")
    theirs, ours = (float(read_map(folder / name).data.double().sum()) for name in ("theirs.mrc", "mask/mask.mrc"))
    for lowest in (10, 20):
        (folder / f"r{lowest}" / "post").mkdir(parents=True)
        call("relion_postprocess", "--i", "run_half1_class001_unfil.mrc", "--mask", "theirs.mrc", "--o", f"r{lowest}/post",
             "--angpix", 3.54, "--auto_bfac", "--autob_lowres", lowest)  # fmt: skip
        call(*frazil, "postprocess", "run_half1_class001_unfil.mrc", "--mask", "theirs.mrc", "--output", f"f{lowest}",
             "--fit-from", lowest)  # fmt: skip
        a, b = read_star(folder / f"r{lowest}/post.star"), read_star(folder / f"f{lowest}/postprocess.star")
        kinds = {"unmasked": "FourierShellCorrelationUnmaskedMaps", "masked": "FourierShellCorrelationMaskedMaps",
                 "randomised": "CorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps",
                 "corrected": "FourierShellCorrelationCorrected"}  # fmt: skip
        apart = {name: round(float(np.abs(a["fsc"]["rln" + k].to_numpy(float) - b["fsc"]["rln" + k].to_numpy(float)).max()), 6)
                 for name, k in kinds.items()}  # fmt: skip
        same = [[float(s["general"]["rln" + k]) for s in (a, b)] for k in ("FinalResolution", "BfactorUsedForSharpening")]
        record("relion", "cpu", fit_from=lowest, apart=apart, resolutions=same[0], b_factors=same[1],
               mask_volume_percent=round(100 * abs(ours / theirs - 1), 4))  # fmt: skip
    shutil.rmtree(folder)


def seeds(count: int = 40) -> None:
    """How far apart FSC curves of random phases lie: RELION's from each other by its seed, and from ours."""
    data = REPOSITORY.parent / "shared" / "data" / "parity_relion5" / "refine3d"
    label = "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps"
    with tempfile.TemporaryDirectory(prefix="frazil-seeds-") as name:
        folder = Path(name)
        halves = [read_map(shutil.copy(data / f"run_half{h}_class001_unfil.mrc", folder)).data for h in (1, 2)]
        write_mrc(folder / "mean.mrc", (halves[0] + halves[1]) / 2, 3.54)

        def call(words: str) -> None:
            subprocess.run(words.split(), cwd=folder, capture_output=True, check=False)  # fails for want of ghostscript, after writing

        call("relion_mask_create --i mean.mrc --o mask.mrc --ini_threshold 0.03 --extend_inimask 3 --width_soft_edge 6 --lowpass 15 "
             "--angpix 3.54")  # fmt: skip
        curves = []
        for seed in range(1, count + 1):
            call(f"relion_postprocess --i run_half1_class001_unfil.mrc --mask mask.mrc --o s{seed} --angpix 3.54 --random_seed {seed}")
            curves.append(read_star(folder / f"s{seed}.star")["fsc"][label].to_numpy(float))
        mask = read_map(folder / "mask.mrc").data
    runs = np.stack(curves)
    ours = [compare_halves(*halves, mask, 3.54, PostprocessParams(), seed).randomised.numpy() for seed in range(8)]
    pairs = [float(np.abs(a - b).max()) for i, a in enumerate(runs) for b in runs[:i]]
    single = [float(np.abs(run - mine).max()) for run in runs for mine in ours]
    record("seeds", "cpu", count=count, relion_pairs_median=round(float(np.median(pairs)), 3), relion_pairs_least=round(min(pairs), 3),
           ours_to_single_median=round(float(np.median(single)), 3), ours_to_single_range=[round(min(single), 3), round(max(single), 3)],
           ours_to_mean=[round(float(np.abs(runs.mean(0) - mine).max()), 4) for mine in ours], bar=0.03)  # fmt: skip


def main() -> None:
    """Parse the options and run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["ssnr", "noise", "zones", "large"])
    parser.add_argument("--box", type=int, default=0, help="instead of 256 (zones) and 500 (large)")
    parser.add_argument("--run", type=Path, help="refine3d directory for `relion`")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if "ssnr" in given.only:
        ssnr(given.device)
    if "noise" in given.only:
        pure_noise(given.device)
    if "zones" in given.only:
        zones(given.device, given.box or 256)
    if "large" in given.only:
        large(given.device, given.box or 500, given.threads)
    if "seeds" in given.only:
        seeds()
    if "relion" in given.only:
        relion(given.run)


if __name__ == "__main__":
    main()
