"""Where the models of an engine are: a bounded number on the device, the others in host memory or in files.

Which models are where never changes a number: a model that left the device comes back as the same bits, as a snapshot brings it back.
"""
