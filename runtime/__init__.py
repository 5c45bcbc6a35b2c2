"""The runtime: schedules, stages, transports and the pipeline."""

if __name__ != "fxsplit.runtime":
    raise ImportError("import this package as fxsplit.runtime, not by its folder's name")
