"""The CUDA kernels of ``csrc/cuda`` on the CPU, thread by thread, to find out what a compiler cannot see.

``translate`` turns CUDA C++ into C++, ``include`` stands in for CUDA's headers, ``machine`` runs the threads, ``build``
makes a Python module of it, ``faults`` plants mistakes. ``module.cpp`` alone knows the kernels' bindings.

What is modelled:

- Each thread is a fiber; it runs until it waits. The schedule is forward, backward or random by a seed.
- A launch goes cluster by cluster. A block starts when its first thread does, and its shared memory holds NaN until it
  is written, before it starts, and after it has ended.
- Asynchronous copies land as late as they may, or at random; their source is read when they land.
- What a thread writes to another block is seen there once the thread has arrived at a cluster barrier with release.
- Barriers of warps, blocks and clusters; distributed shared memory; shuffles; the PTX of ``include/ptx.h``, with the
  errors that the hardware's exponential may have.

What stops a launch: deadlock; threads that wait at different barriers, lanes that shuffle in different places; accesses
and copies that are misaligned; an index beyond an array; shared memory written beyond its end, before its block started
or after it ended; a rank that is not there; copies under way at a thread's end; too much shared memory, and clusters
that the kernel's attributes do not allow.

What is not: the order in which writes to global and to a block's own memory are seen (at once, by all); whether the
lanes of a warp are in step where an instruction wants it; threads that poll memory (no other would go on); clusters
beside one another; time, registers, caches; reads beyond a tensor whose result is not used.
"""
