"""Schedule graph of an optimizer step: operations, dependencies, times, exports.

schedule: `build_schedule`. graph: operations and their times; piped, spanning: of each schedule;
work: seconds and bytes of a piece. export: files, pictures; trace: beside a measured one.
"""
