"""A log run again in this process: replay, dumps, the debugger, and the search for the first job where something holds."""
