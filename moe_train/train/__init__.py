"""Training: engine, loop, step, learning rate, callback protocol, router statistics.

engine: model, optimizer, schedule of a rank. step: one step, one validation; forward: a micro-
batch, its loss. loop: when to step, validate, save, stop. lr_schedule: learning rate. gpipe: that
schedule. router_stats: tokens by expert; metrics: a step's line; tracing: a step's trace.
callback: the protocol.
"""
