//! The uploader: bundles that grow for seconds, in parts, and replace each other under one key.
//!
//! Only the request that makes the parts an object is a write that others see, so only that one passes
//! the gate: a pause need not wait for an upload, and finds some half done.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use object_store::aws::AmazonS3;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStoreExt, PutPayload};

use crate::content::{BUNDLE_KEY, bundle};
use crate::gate::Gate;
use crate::record::{Happening, Recorder};
use crate::settings::Bucket;
use crate::stores::{self, in_time};
use crate::writer::{TRY_AGAIN_AFTER, complain, wait};
use crate::{Attempted, Result};

/// How long an upload rests after each part.
const PART_EVERY: Duration = Duration::from_secs(3);

pub(crate) struct Uploader {
    pub bucket: Bucket,
    pub recorder: Arc<Recorder>,
    pub gate: Gate,
    pub failures: Arc<AtomicU64>,
    pub stop: Arc<AtomicBool>,
}

impl Uploader {
    /// Uploads one bundle after the other, from `number` on.
    pub fn run(&self, mut number: u64) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.attempted("start the uploader")?;
        let client = stores::bucket(&self.bucket)?;
        while !self.stop.load(Ordering::Relaxed) {
            match runtime.block_on(self.parts(&client, number, PART_EVERY)) {
                Ok(upload) => {
                    self.finish(&runtime, &client, number, upload)?;
                    number += 1;
                }
                Err(error) => self.try_again(number, &error),
            }
        }
        Ok(())
    }

    /// Uploads the parts, and rests after each.
    async fn parts(&self, client: &AmazonS3, number: u64, rest: Duration) -> Result<Box<dyn MultipartUpload>> {
        let path = Path::from(BUNDLE_KEY);
        let begin = client.put_multipart(&path);
        let mut upload = in_time("begin a bundle", async { begin.await.attempted("begin a bundle") }).await?;
        for part in bundle(number) {
            let put = upload.put_part(PutPayload::from(part));
            in_time("upload a part", async { put.await.attempted("upload a part") }).await?;
            wait(&self.stop, rest);
        }
        Ok(upload)
    }

    /// Makes the parts an object, however many tries it takes. Whether a try whose answer was lost has
    /// done it is not known, so the gate stays passed until one is acknowledged.
    fn finish(
        &self,
        runtime: &tokio::runtime::Runtime,
        client: &AmazonS3,
        number: u64,
        upload: Box<dyn MultipartUpload>,
    ) -> Result<()> {
        let mut upload = Some(upload);
        let _passage = self.gate.pass();
        self.recorder.note(&Happening::BundleBegun(number))?;
        while !self.stop.load(Ordering::Relaxed) {
            let done = runtime.block_on(async {
                let mut upload = match upload.take() {
                    Some(upload) => upload,
                    None => self.parts(client, number, Duration::ZERO).await?,
                };
                in_time("end a bundle", async { upload.complete().await.attempted("end a bundle") }).await
            });
            match done {
                Ok(_) => return self.recorder.note(&Happening::BundleAcknowledged(number)),
                Err(error) => self.try_again(number, &error),
            }
        }
        Ok(())
    }

    fn try_again(&self, number: u64, error: &str) {
        if self.failures.fetch_add(1, Ordering::Relaxed).is_multiple_of(50) {
            complain(&format!("bundle {number}"), error);
        }
        wait(&self.stop, TRY_AGAIN_AFTER);
    }
}
