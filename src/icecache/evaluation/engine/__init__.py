"""Running a model with one prefill and many caches."""
