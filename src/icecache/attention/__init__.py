"""Which leaves a decode step attends exactly, and the attention over them and the rest."""
