"""One operator each, as rows of programs: made once per layer from its record.

A block says with `areas` what it needs of the scratch memory, before anything is allocated, and adds its steps with
`add`. Its rows may depend on the number of tokens and of KV blocks alone, because they are kept from batch to batch.
"""
