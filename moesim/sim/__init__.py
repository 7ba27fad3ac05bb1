"""The engine: Programs of Ops over Resources, evaluated as arrays between decision points."""
