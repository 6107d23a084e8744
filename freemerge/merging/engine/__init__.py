"""From inputs to a merged model: the plan, the executor, the search, the estimate, the record."""
