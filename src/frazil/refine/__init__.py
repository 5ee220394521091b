"""The likelihood engine: expectation, maximization, sampling and convergence, shared by 2D, 3D, auto-refine and initial model."""
