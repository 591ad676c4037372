//! The hands of Stillpoint: everything that touches clocks, processes, stores and buckets.
