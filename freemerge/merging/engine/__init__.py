"""The merge engine, from inputs to a merged model: plan, executor, search, estimate, record."""
