"""Studies over fit configs: a trial is a run in a directory of its own, made by processes of the trial server."""
