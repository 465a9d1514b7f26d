"""How far generated pictures are from real ones: numerics over feature arrays, none of them on a device."""
