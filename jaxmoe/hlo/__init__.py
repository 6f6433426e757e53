"""Reading programs, HLO and StableHLO: collectives by mesh axes, trip counts, FLOPs, memory."""
