"""How a model is spread over ranks: layouts, groups, rules, sizes, pipeline orders. No torch.

layout: sizes, coordinates, members of groups. sizes: those left open; stages: uneven ones. rules:
what a layout must keep; kernel_rules: what kernels cannot do. groups: communicators that a run
uses. shapes: of a micro-batch on a rank. parameters: counted; optimizer_state: bytes of each;
flops: of a token, MFU. resolved: `ResolvedRun`.
"""
