"""The fast path of the navigation tasks: the package's numbers for a fraction of its time.

What the original repeats and this does not: two of three forward passes per step, sensors in
physics steps whose sensors nobody reads, lidar and distances point by point, contacts by name, a
check of the observation against its space, and the compilation of the world (with a 190 MB sky) at
every reset.

The tasks' own rules - rewards, goals, timers, the order of random draws - stay the package's code,
inherited. mj_forward is a function of the state alone (it does not touch qacc_warmstart), which is
why passes can be left out.

``task`` puts the parts together: ``layout`` (resets), ``lidar`` and ``observation``, ``costs``.
"""
