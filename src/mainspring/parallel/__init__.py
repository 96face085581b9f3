"""Layouts of a model over many ranks: each proven equal to one device.

To read in this order: mesh, layout, collectives, placement, tensor, vocabulary, context, ring, ulysses, experts,
decoder, parallelize, flat, units, schedule, pipeline, checkpoint, monitor.
"""

from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Group, Mesh
from mainspring.parallel.parallelize import parallelize

__all__ = ["Group", "Layout", "Mesh", "parallelize"]
