"""Generated code for CRIU 4.2.1's image files; see generate.py. Import through `relume.images`, not from here."""
