"""Life of the training process: plan, open, restore, train, end.

main: entry of every rank. resolution: on all ranks, compared; broadcast: rank 0's values, errors
of any rank. opening: data, groups, model; state: for the end. training: the loop's parts; restore,
saving: checkpoints; weights: those alone. evaluation, generation: of a trained model; subject: the
PATH of a command. watchdog: hung ranks; signals: stop; shutdown_budget: grace period; failure:
reports, exit codes; torchelastic: torchrun's environment; logs: of a rank.
"""
