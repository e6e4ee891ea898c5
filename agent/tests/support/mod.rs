//! A hand-made `filterd` and a hand-made target, as small as the protocols allow.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // a test that cannot go on fails
#![allow(dead_code)] // each test uses a part

pub mod filterd;
pub mod target;

use std::future::Future;
use std::time::Duration;

/// Waits until `what` holds; a test that hangs says on what.
pub async fn until(name: &str, mut what: impl FnMut() -> bool) {
    let wait = async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(60), wait).await.is_ok(), "never: {name}");
}

/// Runs on a multi-thread runtime, as the product does.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}
