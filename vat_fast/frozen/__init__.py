"""The frozen policy: a plan of steps over named buffers, passes that improve it, executors that run it."""
