"""One module for each command of ``moe-train``: arguments, one call, output.

common: options that several share. output: tables and JSON. calibrate: ``plan --calibrate``. Each
of the others has the name of its command: checkpoint, config, data, dryrun, evaluate, generate,
plan, schedule, tune: see ``COMMANDS`` in ``cli.py``.
Of Hugging Face folders: export_hf, import_hf, verify_hf: ``export-hf`` and so on.
"""
