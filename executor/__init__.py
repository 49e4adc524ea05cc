"""Everything that is computed: weights, the KV slab, the paged forward, sampling."""
