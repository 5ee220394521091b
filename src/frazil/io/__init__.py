"""Files: what RELION and its neighbours write, read into frazil's records, and the other way round.

files      atomic writing, for every writer of the project
mrc        maps, images and stacks (MRC modes 0, 1, 2, 6, 12)
star       STAR files as data frames and dictionaries
particles  particle STAR files as `Particles`
images     particle stacks, read lazily
micrographs  tables and pixels of micrographs (MRC, TIFF)
coordinates  positions of particles: STAR, .box, .cs, .cbox, CSV
models     atomic models as density

Nothing is imported here, so that a command which needs one of them does not pay for all.
"""
