"""The job log on disk: what was asked, what was run and what came out, in segments that are only appended to."""
