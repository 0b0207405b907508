"""Cost model: seconds of compute, links, collectives, pipeline and step.

timing: `step_time`. passes: a layer, embedding, head; compute: their arithmetic; launches: the
host's part. calls: collectives of a micro-batch; communication: of a step; links: what a group's
collective takes. pipeline: passes in a schedule, the bubble. sharing: ranks that share cores.
constants: fitted to published runs.
"""
