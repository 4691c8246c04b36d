"""Operators of a forward pass: FLOPs, typed traffic and the shapes that efficiency depends on."""
