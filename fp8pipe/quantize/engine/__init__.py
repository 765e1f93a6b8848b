"""Carries out a plan: encodes each weight and writes it to its planned bytes; resumes when interrupted.

run        one run over one folder, from lock to record
folder     one writer at a time, and no other weights in the folder
journal    what is finished, so that a killed run resumes
work       pieces of work, which start when their source shards have arrived
pool       threads that run them
workbench  a thread's own buffers, and the arithmetic on the CPU; gpu_bench: on a GPU
units      weights grouped by the range they share
weights    quantized weights, shrinking: their mse observer; kept: the others; scales: inputs and KV cache
views      how a weight is stored in the source
finite     refuses weights that are not finite
finisher   fsync and rename of finished shards
package    the files beside the weights
context    what every task works with; meter: progress in source bytes
"""
