//! The decoder's operations on the CPU: rows of f32 in slices, weights as the file has them, and a team of threads.

pub(super) mod attention;
mod kernels;
mod product;
pub(super) mod rows;
pub(super) mod team;

pub(super) use product::{Matrix, Products};
