"""Particles with known truth, for tests, the demo and benches (spec/refinement 1, 9.2).

phantom    densities of Gaussian blobs, with symmetry; their exact projections
particles  images with CTF, shifts, noise and micrographs, of a phantom or a map
compare    found poses against true ones
"""
from frazil.simulate.compare import PoseDifference, compare_poses
from frazil.simulate.particles import (
    ImageStacks,
    Settings,
    Simulated,
    make_noise,
    noise_spectrum,
    project_volume,
    simulate_particles,
)
from frazil.simulate.phantom import Phantom, density, frequencies, phantom, project_phantom

__all__ = [
    "ImageStacks", "Phantom", "PoseDifference", "Settings", "Simulated", "compare_poses", "density", "frequencies", "make_noise",
    "noise_spectrum", "phantom", "project_phantom", "project_volume", "simulate_particles",
]  # fmt: skip
