//! Tests of the store on simulated and real files.

mod base;
mod compare;
mod crash;
mod damage;
mod exhaustive;
mod expire;
mod offline;
mod order;
mod real_files;
mod recovery_table;
mod runs;
mod source;
