"""The heart: route -> plan -> move rows -> experts -> combine, and the balance of it all."""
