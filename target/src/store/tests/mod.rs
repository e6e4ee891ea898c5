//! Tests of the store on simulated and real files.

mod crash;
mod source;
