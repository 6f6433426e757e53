"""Pure array functions: arrays in, arrays out, no parameters and no state.

Every operation has a plain reference that a reader can check against the formula. Where a faster
form exists, the package of the operation holds a visible dict `BACKENDS` of interchangeable
functions, and one contract test runs each of them against the same oracle.
"""
