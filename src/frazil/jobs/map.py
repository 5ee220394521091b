"""`frazil map ACTION`: make, change, compare, convert and show maps. Each action reads and writes MRC files; they live in jobs/map_*.py."""
from __future__ import annotations

from frazil.jobs import Action, map_files, map_space, map_values

ACTIONS: dict[str, Action] = {
    "info": Action(map_files.InfoParams, ("maps",), map_files.info),
    "picture": Action(map_files.PictureParams, ("map",), map_files.picture),
    "convert": Action(map_files.ConvertParams, ("map",), map_files.convert),
    "from-model": Action(map_files.FromModelParams, ("model",), map_files.from_model),
    "sphere": Action(map_files.SphereParams, (), map_files.sphere),
    **{name: Action(map_values.ArithmeticParams, ("map", "other"), map_values.arithmetic(name)) for name in map_values.OPERATIONS},
    "difference": Action(map_values.DifferenceParams, ("map", "other"), map_values.difference),
    "normalise": Action(map_values.NormaliseParams, ("map",), map_values.normalise),
    "threshold": Action(map_values.ThresholdParams, ("map",), map_values.threshold),
    "lowpass": Action(map_values.PassParams, ("map",), map_values.lowpass),
    "highpass": Action(map_values.PassParams, ("map",), map_values.highpass),
    "bandpass": Action(map_values.BandpassParams, ("map",), map_values.bandpass),
    "b-factor": Action(map_values.BFactorParams, ("map",), map_values.b_factor),
    "crop": Action(map_space.CropParams, ("map",), map_space.crop_map),
    "resample": Action(map_space.ResampleParams, ("map",), map_space.resample_map),
    "mirror": Action(map_space.MirrorParams, ("map",), map_space.mirror_map),
    "shift": Action(map_space.ShiftParams, ("map",), map_space.shift_map),
    "rotate": Action(map_space.RotateParams, ("map",), map_space.rotate_map),
    "symmetrise": Action(map_space.SymmetriseParams, ("map",), map_space.symmetrise_map),
    "find-symmetry": Action(map_space.FindSymmetryParams, ("map",), map_space.symmetry_of_map),
    "align": Action(map_space.AlignParams, ("map", "target"), map_space.align_map),
}
